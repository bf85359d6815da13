"""Train the model that comes with the clone: first on spoken transcripts, then on real clips.

    python -m tools.finetune -spoken build/spoken -data FOLDER -out build/model -decoder lstm

-spoken: a folder from `make_sample_data -metadata`, all of LJ Speech's transcripts in a neural
voice; those of the real validation and test clips are left out of the training. -data: a folder
with a few hundred real clips. Both trainings are the notebook's, except that each clip is varied
anew every time it is used: its pace, the length of the throat, the echo of a room, noise. That is
for voices and rooms that are not in the training data; on LJ Speech's one voice alone it would gain
nothing.

Saves OUT/varied/checkpoints/q3-<decoder>.pt and, with the weights of the fine-tuning's epoch that
was best on validation, OUT/finetuned/checkpoints/q3-<decoder>.pt; results beside them. The first
training's result has the scores of its model on the first spoken test clips, also with a search.
"""

import copy
import math
from dataclasses import replace

import runs
from tools import letters, make_model

import torch
import torch.nn.functional as F

NOTEBOOK = runs.ROOT / "hw2-q3.ipynb"

SPEED = 0.1  # how much faster or slower a clip may become, as a share
WARP = 0.1  # how much its bands may be stretched or squeezed, as a share
REVERB = 0.5  # share of the clips that get the echo of a room
NOISE = 0.5  # share of the clips that get noise
SCORED = 300  # spoken test clips on which the first training's model is scored with a search


# --------------------------------------------------------------------------- one clip, varied
UNIT = 4 * math.log(10)  # a unit of the features, four decades of power, as a natural logarithm


def uniform(low, high):
    return torch.empty(()).uniform_(low, high).item()


def change_speed(clip, factor):
    """The clip, `factor` times as fast: (T, 80) -> (T / factor, 80)."""
    n_frames = max(1, round(len(clip) / factor))
    bands = clip.T[None]  # (1, 80, T)
    return F.interpolate(bands, n_frames, mode="linear")[0].T


def warp_bands(clip, factor, shift):
    """Move what is in band factor * b + shift to band b, as a shorter or longer throat would."""
    n_mels = clip.shape[1]
    place = (factor * torch.arange(n_mels) + shift).clamp(0, n_mels - 1)
    below, above = place.floor().long(), place.ceil().long()
    share = place - below
    return clip[:, below] * (1 - share) + clip[:, above] * share


def add_echo(clip, strength, decay, n_frames=40):
    """Add to each frame the fading power of the frames before it: (T, 80) -> (T, 80).

    Frame t gets strength * exp(-k / decay) of the power of frame t - k, for k up to `n_frames`.
    """
    fading = strength * torch.exp(-torch.arange(n_frames, 0, -1) / decay)
    kernel = torch.cat([fading, torch.ones(1)])  # the last weight is the frame's own
    power = (UNIT * clip).exp().T[:, None]  # (80, 1, T)
    power = F.conv1d(F.pad(power, (n_frames, 0)), kernel[None, None])
    return power[:, 0].T.log() / UNIT


def add_noise(clip, level, tilt):
    """Add noise to a clip (T, 80), from level - tilt in the lowest band to level + tilt in the top.

    Both are in units of the features. The power of noise in a frame and band is exponentially
    distributed.
    """
    floor = level + tilt * torch.linspace(-1, 1, clip.shape[1])  # (80,)
    noise = UNIT * floor + torch.empty_like(clip).exponential_().log()  # (T, 80)
    return torch.logaddexp(UNIT * clip, noise) / UNIT


def vary(clip):
    """A clip as another voice might have spoken it in another room: (T, 80) -> (T', 80)."""
    clip = change_speed(clip, 1 + uniform(-SPEED, SPEED))
    clip = warp_bands(clip, 1 + uniform(-WARP, WARP), uniform(-2, 2))
    if uniform(0, 1) < REVERB:
        decay = uniform(3, 18)  # frames
        clip = add_echo(clip, uniform(0, 1.5) / decay, decay)
    if uniform(0, 1) < NOISE:
        clip = add_noise(clip, clip.max() - uniform(0.5, 1.5), uniform(-0.5, 0.5))
    return clip


class VariedClips(list):
    """A list of clips whose [i] varies clip i anew each time."""

    def __getitem__(self, i):
        return vary(super().__getitem__(i).float())


def varied(corpus):
    """The corpus with varied training clips; validation and test stay as they are."""
    features = {**corpus.features, "train": VariedClips(corpus.features["train"])}
    return replace(corpus, features=features)


# ------------------------------------------------------------------------------- two trainings
def without(corpus, held_out):
    """The corpus without the training clips whose id or text is in `held_out`.

    Its info says how many these were.
    """
    clips = corpus.rows["train"]
    kept = [i for i, (clip, text, _) in enumerate(clips) if not {clip, text} & held_out]
    parts = {
        name: {**whole, "train": [whole["train"][i] for i in kept]}
        for name, whole in (
            ("rows", corpus.rows),
            ("features", corpus.features),
            ("tokens", corpus.tokens),
        )
    }
    counts = {**corpus.info["counts"], "train": len(kept)}
    info = {**corpus.info, "counts": counts, "held_out": len(clips) - len(kept)}
    return replace(corpus, **parts, info=info)


def record_variation(result):
    """Note in a result how much clips were varied."""
    result["varied"] = {"speed": SPEED, "warp": WARP, "reverb": REVERB, "noise": NOISE}


def train_on_speech(decoder, q3, corpus):
    """The first training: the notebook's, on varied clips; returns the checkpoint's path."""
    run = q3.train(decoder, varied(corpus), q3.settings)
    if "spoken" in run.result:  # it was trained and scored before
        return run.checkpoint
    record_variation(run.result)
    rows = corpus.rows["test"][:SCORED]
    model = run.model.eval()
    run.result["spoken"] = {
        "search": make_model.score_recordings(q3, model, rows, letter_share=0),
        "search with letters": make_model.score_recordings(q3, model, rows),
    }
    q3.test(run, corpus, q3.settings)
    texts = run.result["clips"]
    pairs = texts["reference"][:SCORED], texts["hypothesis"][:SCORED]
    run.result["spoken"]["greedy"] = make_model.scores_of(q3, *pairs)
    run.save()
    return run.checkpoint


def start_from(checkpoint, q3, corpus):
    """A run on this corpus that starts from the weights of a checkpoint."""
    saved = runs.load_checkpoint(checkpoint)
    run = q3.new_run(saved["sizes"]["decoder"], corpus, q3.settings)
    run.model = q3.load_model(checkpoint, q3.DEVICE)
    run.sizes = saved["sizes"]
    n_steps = q3.settings.epochs * math.ceil(len(corpus.rows["train"]) / q3.settings.batch_size)
    run.optimizer, run.schedule = q3.new_optimizer(run.model, q3.settings, n_steps)
    keys = ("command", "config", "data", "environment", "seconds", "spoken", "test")
    run.result["started_from"] = {key: saved["result"][key] for key in keys}
    return run


def finetune(run, q3, corpus):
    """Train on; keep the weights of the epoch that was best on validation, and test them."""
    clips = varied(corpus)
    best = -1.0
    for epoch in run.start(resume=False):
        loss = q3.train_epoch(run.model, run.optimizer, run.schedule, clips, q3.settings, epoch)
        metrics, _, _ = q3.evaluate(run.model, corpus, "val", q3.settings)
        row = run.after_epoch(loss, metrics, parameters=q3.n_trained(run.model))
        q3.print_epoch(run.result["run"], row)
        if metrics["damerau_levenshtein"] > best:
            best = metrics["damerau_levenshtein"]
            kept = copy.deepcopy(run.model.state_dict())
            run.result["kept_epoch"] = epoch
    run.model.load_state_dict(kept)
    record_variation(run.result)
    q3.test(run, corpus, q3.settings)
    run.save()


# ------------------------------------------------------------------------------- command line
def make_parser():
    whole = runs.number(int, 1)
    parser = runs.ArgumentParser(__doc__)
    parser.flag("spoken", required=True, help="folder with transcripts in a neural voice")
    parser.flag("data", required=True, help="folder with real clips")
    parser.flag("out", default="build/model", help="folder for varied/ and finetuned/")
    parser.flag("decoder", choices=["lstm", "transformer"], default="transformer", help="which")
    parser.flag("epochs", type=whole, default=15, help="of the first training")
    parser.flag("tuning_epochs", type=whole, default=20, help="of the fine-tuning")
    parser.flag("seed", type=runs.SEED, default=42, help="of both")
    parser.flag("resume", action="store_true", help="go on with a first training, or take it")
    return parser


def main(args):
    """Train on spoken transcripts, then on real clips."""
    runs.COMMAND = runs.command_line()
    speech = {"data": args.spoken, "out": f"{args.out}/varied", "epochs": args.epochs}
    q3 = runs.load_definitions(NOTEBOOK, **speech, seed=args.seed, resume=int(args.resume))
    spoken = without(q3.load_corpus(q3.settings), letters.held_out(args.data))
    checkpoint = train_on_speech(args.decoder, q3, spoken)

    real = {"data": args.data, "out": f"{args.out}/finetuned", "epochs": args.tuning_epochs}
    q3 = runs.load_definitions(NOTEBOOK, **real, seed=args.seed, learning_rate=3e-4)
    corpus = q3.load_corpus(q3.settings)
    run = start_from(checkpoint, q3, corpus)
    finetune(run, q3, corpus)
    print(f"{run.checkpoint}: {run.result['test']['damerau_levenshtein']:.3f} on test clips")


if __name__ == "__main__":
    again = "-resume goes on with the first training"
    runs.run_script(main, make_parser(), "closing other programs", again)
