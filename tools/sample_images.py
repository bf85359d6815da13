"""A stand-in for OCTMNIST: retinal B-scans drawn by a small procedural model.

Four classes as in OCTMNIST, in its proportions and its file format, with a label that says that
they are synthetic. On one machine, the same seed draws the same images.
"""

import runs
from runs import UserError

import numpy as np
from tqdm import tqdm

EDITION = 3  # raise it when the images change: samples already written are then made again
SOURCE = "synthetic sample (procedural B-scans)"

SIZE = 28  # pixels a side
FINE = 2  # points drawn per pixel and side, then averaged
BATCH = 200  # images drawn at a time: bounds the memory
SPLITS = {  # images of each class: CNV, DME, drusen, normal
    "train": (1_100, 336, 256, 1_508),
    "val": (138, 42, 32, 188),
    "test": (250, 250, 250, 250),  # OCTMNIST's own, so that the course's subset is in it
}
CNV, DME, DRUSEN, NORMAL = range(4)
MILDEST = np.array([0.1, 0.1, 0.65, 0.0])  # severity of the mildest case: how hard the task is
SPECKLE = 24  # shape of the gamma noise: its standard deviation is 1/sqrt(24) of the brightness

# All lengths below are in pixels, and every array has the axes (N, depth, x), of size 1 where it
# does not vary: x runs along the retina, depth into the eye.
X = np.arange(0, SIZE, 1 / FINE, dtype=np.float32)  # (56,)
DEPTH = X[:, None]  # (56, 1)


def bell(x, centre, width):
    """A smooth bump: 1 at `centre`, 1/e at `width` from it."""
    return np.exp(-(((x - centre) / width) ** 2))


class Scans:
    """The random numbers of one batch of scans of the classes `labels` (N,)."""

    def __init__(self, labels, random):
        self.labels = labels
        self.random = random
        severity = self.uniform(MILDEST[labels][:, None, None], 1)  # (N, 1, 1)
        self.cnv = severity * self.are(CNV)
        self.dme = severity * self.are(DME)
        self.drusen = severity * self.are(DRUSEN)
        self.fovea = self.uniform(10, 18)  # (N, 1, 1): where the retina is thinnest
        self.lesion = self.fovea + self.uniform(-4, 4)  # (N, 1, 1): where the disease is worst

    def uniform(self, low, high, *shape):
        """A number for each scan, (N, *shape, 1, 1)."""
        shape = (len(self.labels), *shape, 1, 1)
        return self.random.uniform(low, high, shape).astype(np.float32)

    def are(self, label):
        """Which scans are of this class, (N, 1, 1)."""
        return (self.labels == label)[:, None, None]


def draw_surfaces(scans):
    """Where the retina begins and ends: (inner limiting membrane, pigment epithelium), (N, 1, 56).

    CNV raises the outer layer in one place, DME swells the retina, drusen are bumps of the outer
    layer, and a normal retina has a clean foveal dip.
    """
    uniform = scans.uniform
    from_centre = X - SIZE / 2
    tilt = uniform(15, 21) + uniform(-0.2, 0.2) * from_centre
    outer = tilt - uniform(-0.002, 0.012) * from_centre**2

    raised = scans.cnv * uniform(4, 8) * bell(X, scans.lesion, uniform(3, 6))
    dip = uniform(2.5, 4) * bell(X, scans.fovea, uniform(2, 4)) * (1 - 0.5 * scans.cnv - scans.dme)
    swelling = scans.dme * uniform(2, 6) * bell(X, scans.lesion, uniform(4, 7))
    inner = outer - uniform(5.5, 7.5) - 0.7 * raised + dip - swelling

    offsets = np.reshape([-7, -2.5, 2.5, 7], (4, 1, 1))
    places = scans.fovea[:, None] + offsets + uniform(-2.3, 2.3, 4)  # (N, 4, 1, 1)
    bumps = uniform(1.5, 4, 4) * bell(X, places, uniform(1, 2.2, 4))  # (N, 4, 1, 56)
    outer = outer - raised - scans.drusen * bumps.max(axis=1)
    return np.minimum(inner, outer - 1.5), outer


def draw_brightness(scans, inner, outer):
    """What lies between the surfaces and below them: brightness (N, 56, 56), about 0 to 255.

    CNV breaks the outer layer and leaves bright material about it, DME fills the retina with dark
    cysts.
    """
    uniform = scans.uniform
    below = DEPTH - outer  # (N, 56, 56): distance below the pigment epithelium
    retina = (below < 0) / (1 + np.exp(-4 * (DEPTH - inner)))  # 1 within, 0 outside

    image = 20 + retina * (75 - 40 * bell(below, -2.5, 1.2))
    image = image + 45 * bell(DEPTH, inner + 0.8, 0.9)

    break_height = scans.cnv * uniform(0.6, 1)
    broken = break_height * bell(X, scans.lesion + uniform(-4, 4), uniform(1.5, 4))
    image += (1 - broken) * 130 * bell(below, 0, 0.8)
    image += (below > 0) * uniform(50, 90) * np.exp(-np.maximum(below, 0) / uniform(3, 7))

    material = scans.cnv * uniform(60, 140) * bell(X, scans.lesion, uniform(2, 5))
    image += material * bell(below, uniform(-2.5, 2), uniform(1, 2))

    for share in (1, 0.6, 0.4):  # of the DME scans that have a first, a second, a third cyst
        centre = outer + uniform(0.35, 0.65) * (inner - outer)
        along = bell(X, scans.lesion + uniform(-4, 4), uniform(1, 2.5))
        cyst = along * bell(DEPTH, centre, uniform(1, 2))
        has_cyst = (scans.dme > 0) * (uniform(0, 1) < share)
        image *= 1 - has_cyst * retina * cyst
    return image


def photograph(scans, image):
    """Brightness (N, 56, 56) -> pixels, uint8 (N, 28, 28), with speckle and white corners."""
    image = image.reshape(len(image), SIZE, FINE, SIZE, FINE).mean(axis=(2, 4))  # (N, 28, 28)
    exposure = scans.uniform(0.7, 1.2)
    image *= exposure * scans.random.gamma(SPECKLE, 1 / SPECKLE, image.shape)

    # Scans were straightened, so that white corners remain where nothing was recorded.
    slope = scans.uniform(-9, 3) + scans.uniform(-0.3, 0.3) * (X[::FINE] - SIZE / 2)
    image[DEPTH[::FINE] < slope] = 255
    return np.clip(image, 0, 255).astype(np.uint8)


def draw_scans(labels, random):
    """Draw B-scans, uint8 (N, 28, 28), of the classes `labels` (N,), with a NumPy generator."""
    scans = Scans(labels, random)
    inner, outer = draw_surfaces(scans)
    image = draw_brightness(scans, inner, outer)
    return photograph(scans, image)


def draw_splits(seed):
    """The six arrays of MedMNIST's format: uint8 images (N, 28, 28) and labels (N, 1) a split."""
    random = np.random.default_rng(seed)
    arrays = {}
    for split, counts in SPLITS.items():
        classes = np.arange(len(counts), dtype=np.uint8)
        labels = random.permutation(np.repeat(classes, counts))
        images = []
        starts = range(0, len(labels), BATCH)
        for start in tqdm(starts, f"drawing {split}", leave=False, disable=runs.QUIET):
            images.append(draw_scans(labels[start : start + BATCH], random))
        arrays[f"{split}_images"] = np.concatenate(images)
        arrays[f"{split}_labels"] = labels[:, None]
    return arrays


def settings_of(path):
    """The settings that the sample at `path` was drawn with; None where there is no file.

    UserError for a file that is damaged or not from here: it is left alone.
    """
    if not path.exists():
        return None
    found = {}
    if runs.is_whole_zip(path):
        with np.load(path, allow_pickle=False) as file:
            found = {key: str(file[key]) for key in ("source", "settings") if key in file.files}
    if found.get("source") != SOURCE:
        fault = "is damaged or not from this script"
        raise UserError(f"{path} {fault}; delete it, or name another folder with -out.")
    return found.get("settings")


def make_octmnist(out, seed):
    """Write `out`/octmnist.npz, whole or not at all; returns a one-line summary."""
    path = out / "octmnist.npz"
    settings = f"edition {EDITION}, seed {seed}"
    if settings_of(path) == settings:
        return f"{path}: complete already ({SOURCE})"
    arrays = draw_splits(seed)
    with runs.write_atomically(path) as temporary:
        np.savez_compressed(temporary, source=SOURCE, settings=settings, **arrays)
    counts = " + ".join(f"{sum(counts):,}" for counts in SPLITS.values())
    return f"{path}: {counts} images ({SOURCE})"
