"""A stand-in for OCTMNIST: retinal B-scans drawn by a small procedural model.

The file has OCTMNIST's format, its four classes in its proportions, and a label that says that the
images are synthetic. On one machine, the same seed draws the same images.
"""

import runs
from runs import UserError

import numpy as np

EDITION = 3  # raise it when the images change: samples already written are then made again
SOURCE = "synthetic sample (procedural B-scans)"

SIZE = 28  # pixels a side
FINE = 2  # points drawn per pixel and side, then averaged
BATCH = 200  # images drawn at a time, which limits the memory
SPLITS = {  # images of each class: CNV, DME, drusen, normal
    "train": (1_100, 336, 256, 1_508),
    "val": (138, 42, 32, 188),
    "test": (250, 250, 250, 250),  # as in OCTMNIST, so that it contains the course's subset
}
MILDEST = np.array([0.1, 0.1, 0.65, 0.0])  # severity of each class's mildest case, at most 1
SPECKLE = 24  # shape of the gamma noise: its standard deviation is 1/sqrt(24) of the brightness

# Lengths are in pixels; x runs along the retina, depth into the eye.
X = np.arange(0, SIZE, 1 / FINE, dtype=np.float32)  # (56,)
DEPTH = X[:, None]  # (56, 1)


def bell(x, centre, width):
    """A smooth bump: 1 at `centre`, 1/e at `width` from it."""
    return np.exp(-(((x - centre) / width) ** 2))


def draw_scans(labels, random):
    """Draw B-scans, uint8 (N, 28, 28), of the classes `labels` (N,), with a NumPy generator.

    The arrays in between have the axes (N, depth, x), of size 1 where nothing varies along them.
    """

    def uniform(low, high, *shape):
        """Numbers for each scan, (N, *shape, 1, 1)."""
        shape = (len(labels), *shape, 1, 1)
        return random.uniform(low, high, shape).astype(np.float32)

    severity = uniform(MILDEST[labels][:, None, None], 1)
    cnv, dme, drusen = (severity * (labels == label)[:, None, None] for label in (0, 1, 2))
    fovea = uniform(10, 18)  # where the retina is thinnest
    lesion = fovea + uniform(-4, 4)  # where the disease is worst

    # The depths where the retina begins and ends, inner and outer, (N, 1, 56). CNV raises the outer
    # layer in one place, DME swells the retina, drusen are bumps of the outer layer.
    from_centre = X - SIZE / 2
    tilt = uniform(15, 21) + uniform(-0.2, 0.2) * from_centre
    outer = tilt - uniform(-0.002, 0.012) * from_centre**2

    raised = cnv * uniform(4, 8) * bell(X, lesion, uniform(3, 6))
    dip = uniform(2.5, 4) * bell(X, fovea, uniform(2, 4)) * (1 - 0.5 * cnv - dme)
    swelling = dme * uniform(2, 6) * bell(X, lesion, uniform(4, 7))
    inner = outer - uniform(5.5, 7.5) - 0.7 * raised + dip - swelling

    offsets = np.reshape([-7, -2.5, 2.5, 7], (4, 1, 1))
    places = fovea[:, None] + offsets + uniform(-2.3, 2.3, 4)  # (N, 4, 1, 1)
    bumps = uniform(1.5, 4, 4) * bell(X, places, uniform(1, 2.2, 4))  # (N, 4, 1, 56)
    outer = outer - raised - drusen * bumps.max(axis=1)
    inner = np.minimum(inner, outer - 1.5)

    # Brightness, (N, 56, 56), about 0 to 255: the retina, its inner edge, its bright outer layer
    # and what lies below. CNV breaks the outer layer and leaves bright material about it.
    below = DEPTH - outer  # distance below the outer layer
    retina = (below < 0) / (1 + np.exp(-4 * (DEPTH - inner)))  # 1 within, 0 outside
    image = 20 + retina * (75 - 40 * bell(below, -2.5, 1.2))
    image = image + 45 * bell(DEPTH, inner + 0.8, 0.9)

    break_height = cnv * uniform(0.6, 1)
    broken = break_height * bell(X, lesion + uniform(-4, 4), uniform(1.5, 4))
    image += (1 - broken) * 130 * bell(below, 0, 0.8)
    image += (below > 0) * uniform(50, 90) * np.exp(-np.maximum(below, 0) / uniform(3, 7))

    material = cnv * uniform(60, 140) * bell(X, lesion, uniform(2, 5))
    image += material * bell(below, uniform(-2.5, 2), uniform(1, 2))

    # DME fills the retina with dark cysts: all scans have a first one, 60 % a second, 40 % a third.
    for share in (1, 0.6, 0.4):
        centre = outer + uniform(0.35, 0.65) * (inner - outer)
        along = bell(X, lesion + uniform(-4, 4), uniform(1, 2.5))
        cyst = along * bell(DEPTH, centre, uniform(1, 2))
        has_cyst = (dme > 0) * (uniform(0, 1) < share)
        image *= 1 - has_cyst * retina * cyst

    # The photograph: pixels, exposure, speckle, and the white corners that are left where a scan
    # was straightened.
    image = image.reshape(-1, SIZE, FINE, SIZE, FINE).mean(axis=(2, 4))  # (N, 28, 28)
    image *= uniform(0.7, 1.2) * random.gamma(SPECKLE, 1 / SPECKLE, image.shape)
    edge = uniform(-9, 3) + uniform(-0.3, 0.3) * from_centre[::FINE]
    image[DEPTH[::FINE] < edge] = 255
    return np.clip(image, 0, 255).astype(np.uint8)


def draw_splits(seed):
    """The six arrays of MedMNIST's format: uint8 images (N, 28, 28) and labels (N, 1) per split."""
    random = np.random.default_rng(seed)
    arrays = {}
    for split, counts in SPLITS.items():
        classes = np.arange(len(counts), dtype=np.uint8)
        labels = random.permutation(np.repeat(classes, counts))
        starts = range(0, len(labels), BATCH)
        images = [draw_scans(labels[start : start + BATCH], random) for start in starts]
        arrays[f"{split}_images"] = np.concatenate(images)
        arrays[f"{split}_labels"] = labels[:, None]
    return arrays


def label_of(path):
    """The label of the sample at `path`; UserError for a file that is damaged or no sample."""
    label = {}
    if runs.is_whole_zip(path):
        with np.load(path) as file:
            label = {key: str(file[key]) for key in ("source", "settings") if key in file.files}
    if label.get("source") != SOURCE:
        fault = "is damaged or not from this script"
        raise UserError(f"{path} {fault}; delete it, or name another folder with -out.")
    return label


def make_octmnist(out, seed):
    """Write `out`/octmnist.npz, whole or not at all; returns a one-line summary."""
    path = out / "octmnist.npz"
    label = {"source": SOURCE, "settings": f"edition {EDITION}, seed {seed}"}
    if path.exists() and label_of(path) == label:
        return f"{path}: complete already ({SOURCE})"
    with runs.write_atomically(path) as temporary:
        np.savez_compressed(temporary, **label, **draw_splits(seed))
    counts = " + ".join(f"{sum(counts):,}" for counts in SPLITS.values())
    return f"{path}: {counts} images ({SOURCE})"
