"""The pictures of hw2-q3.ipynb: architecture, masks, how a text is read, curves, attention maps.

Each function draws one figure and returns it; `utils.save_figure` labels and saves it. What they
show of a model (states, weights of attention) is read from it here as well.
"""

from contextlib import contextmanager

import runs
import utils
from utils import PAD, START, STOP, VOCABULARY

import numpy as np
import PIL.Image
import torch
from matplotlib.colors import PowerNorm
from rapidfuzz.distance import Levenshtein

plt = utils.pyplot()

NAMES = {"lstm": "LSTM", "transformer": "transformer"}
COLOURS = {"lstm": "C0", "transformer": "C1"}
SCORES = {
    "damerau_levenshtein": "Damerau–Levenshtein",
    "jaccard": "Jaccard",
    "cosine": "Cosine",
    "wer": "WER",
    "cer": "CER",
}
SIMILARITIES = ("damerau_levenshtein", "jaccard", "cosine")
FRAME = 2 * utils.HOP / utils.SAMPLE_RATE  # seconds between two frames of z


# ------------------------------------------------------------------------------------ architecture
BOX = {"boxstyle": "round,pad=0.35", "facecolor": "#eef3fa", "edgecolor": "#33527a"}
CIRCLE = {"boxstyle": "circle,pad=0.1", "facecolor": "white"}
ARROW = {"arrowstyle": "->", "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}
CENTRED = {"ha": "center", "va": "center", "fontsize": 8}


def arrow(axis, start, *corners, end):
    """A line from `start` (x, y) around `corners` to `end`, where its head is."""
    path = [start, *corners, end]
    axis.plot(*zip(*path[:-1], strict=True), color="black", linewidth=0.8)
    axis.annotate("", end, path[-2], arrowprops=ARROW)


def figure_1():
    """The assignment's Figure 1: from sound to the next token, and back into the decoder."""
    figure, axis = plt.subplots(figsize=(9.2, 2.3), layout="constrained")
    axis.set(xlim=(-0.6, 11.2), ylim=(-0.4, 2.4))
    axis.axis("off")
    axis.text(0, 2, "sound\n(samples)", **CENTRED)
    axis.text(2, 2, "features\n(T, 80)", **CENTRED)
    axis.text(4.1, 2, "encoder\n(Appendix B)", bbox=BOX, **CENTRED)
    axis.text(5.9, 2, "z\n(S, D)", **CENTRED)
    axis.text(7.8, 2, "decoder\n(Q3.1 or Q3.2)", bbox=BOX, **CENTRED)
    axis.text(10.3, 2, "logits of the\nnext token (V)", **CENTRED)
    axis.text(7.8, 0, "tokens so far: < t h e", bbox={**BOX, "facecolor": "white"}, **CENTRED)
    for start, end in ((0.5, 1.55), (2.45, 3.45), (4.75, 5.6), (6.2, 7.1), (8.5, 9.65)):
        arrow(axis, (start, 2), end=(end, 2))
    arrow(axis, (7.8, 0.22), end=(7.8, 1.72))
    arrow(axis, (10.3, 1.7), (10.3, 0), end=(8.62, 0))
    axis.text(10.2, 0.8, "the likeliest\nis appended", ha="right", va="center", fontsize=8)
    return figure


def cross_attention_block(step):
    attention = ["x", "LayerNorm", ("multi-head attention", "z: keys, values"), "+", "LayerNorm"]
    mlp = ["x", "LayerNorm", "MLP", "+", "LayerNorm"]
    return (f"{step} residual\ncross-attention\nblock (C)", attention + mlp)


SELF_ATTENTION = ["x", "LayerNorm", ("multi-head attention", "causal mask"), "+", "LayerNorm"]
LSTM_DECODER = [
    ("1 embedding", ["embedding"]),
    ("2 normalisation,\nthen LSTM", ["LayerNorm", "LSTM"]),
    cross_attention_block(3),
    ("4 normalisation", ["LayerNorm"]),
    ("5 linear", ["linear"]),
]
TRANSFORMER_DECODER = [
    ("1 embedding", ["embedding"]),
    ("2 positions", ["+ position matrix"]),
    ("3 residual\nattention layer\nwith mask (A)", SELF_ATTENTION),
    cross_attention_block(4),
    ("5 normalisation", ["LayerNorm"]),
    ("6 linear", ["linear"]),
]


def draw_decoder(axis, title, steps):
    """Draw a decoder from the bottom up.

    steps: (name of the step, its parts). A part is the text of a box, or (text, what enters the box
    from the right), or "x", where a residual path leaves, or "+", where it comes back.
    """
    axis.set_title(title)
    axis.axis("off")
    axis.text(0, -1, "tokens so far  (B, T)", **CENTRED)
    y = 0
    for name, parts in steps:
        lowest = y
        for part in parts:
            if part == "x":
                leaves = y - 0.5
                continue
            text, side = part if isinstance(part, tuple) else (part, "")
            arrow(axis, (0, y - 0.72), end=(0, y - 0.26))
            if text == "+":
                axis.text(0, y, "+", bbox=CIRCLE, **CENTRED)
                arrow(axis, (0, leaves), (-2.1, leaves), (-2.1, y), end=(-0.25, y))
            else:
                axis.text(0, y, text, bbox=BOX, **CENTRED)
            if side:
                arrow(axis, (2.9, y), end=(1.75, y))
                axis.text(3.0, y, side, ha="left", va="center", fontsize=8)
                below = "queries" if side.startswith("z") else "queries, keys, values"
                axis.text(0.15, y - 0.5, below, ha="left", va="center", fontsize=7)
            y += 1
        axis.plot((-2.7, -2.7), (lowest - 0.35, y - 0.65), color="#33527a", linewidth=2)
        axis.text(-2.9, (lowest + y - 1) / 2, name, ha="right", va="center", fontsize=8)
    arrow(axis, (0, y - 0.72), end=(0, y - 0.3))
    axis.text(0, y, "logits of the next tokens  (B, T, V)", **CENTRED)
    axis.set(xlim=(-6.3, 5.2), ylim=(-1.4, y + 0.4))


def figure_2():
    """The assignment's Figures 2a and 2b: both decoders, with its numbers of the steps."""
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 7.4), layout="constrained")
    draw_decoder(axes[0], "Figure 2a: the LSTM decoder (Q3.1)", LSTM_DECODER)
    draw_decoder(axes[1], "Figure 2b: the transformer decoder (Q3.2)", TRANSFORMER_DECODER)
    return figure


# ------------------------------------------------------------------------------- inputs and masks
def clip_as_wave_and_mel(samples, features, title):
    """A clip's samples (n_samples,) above its features (T, 80)."""
    seconds = len(samples) / utils.SAMPLE_RATE
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 4), sharex=True, layout="constrained")
    top.plot(np.arange(len(samples)) / utils.SAMPLE_RATE, samples, linewidth=0.3)
    top.set(ylabel="Amplitude")
    top.set_title(title, parse_math=False)
    extent = (0, seconds, 0, utils.N_MELS)
    picture = bottom.imshow(features.float().T, origin="lower", aspect="auto", extent=extent)
    bottom.set(xlabel="Time (s)", ylabel="Mel band")
    figure.colorbar(picture, ax=bottom, label="Log power")
    return figure


def masks(padding, causal):
    """The padding masks of a batch (B, 1, 1, S) and a causal mask (T, T). White: may be seen."""
    figure, axes = plt.subplots(1, len(padding) + 1, figsize=(9.2, 2.8), layout="constrained")
    size = padding.shape[-1]
    for axis, row in zip(axes, padding, strict=False):
        axis.imshow(row[0].expand(size, size), cmap="gray", vmin=0, vmax=1)
        title = f"Padding, {int(row.sum())} frames"
        axis.set(title=title, xlabel="Key (frame)", ylabel="Query (frame)")
        axis.set(xticks=(0, 5, 10), yticks=(0, 5, 10))
    axes[-1].imshow(causal, cmap="gray", vmin=0, vmax=1)
    title = f"Causal, {len(causal)} letters"
    axes[-1].set(title=title, xlabel="Key (letter)", ylabel="Query (letter)")
    axes[-1].set(xticks=(0, 5), yticks=(0, 5))
    return figure


# -------------------------------------------------------------------- how a decoder reads a word
WORD = "<sailor"


def device_of(module):
    return next(module.parameters()).device


def word_tokens(decoder):
    """WORD as tokens (1, T), and a clip without sound (1, 1, D)."""
    device = device_of(decoder)
    tokens = torch.tensor([[VOCABULARY.index(letter) for letter in WORD]], device=device)
    return tokens, torch.zeros(1, 1, decoder.embedding.embedding_dim, device=device)


@torch.no_grad()
def states_of(decoder, tokens, silence):
    """What an LSTM decoder's recurrent layer shows after each letter: (1, T) -> (T, D)."""
    shown = []
    hook = decoder.lstm.register_forward_hook(lambda layer, inputs, output: shown.append(output[0]))
    decoder.eval()(tokens, silence)
    hook.remove()
    return shown[0][0].cpu()


def influence(decoder, tokens, silence):
    """How much the state after letter t changes with letter s: (1, T) -> (T, T).

    Mean over all letters that might stand at s; each row is divided by its largest entry.
    """
    states = states_of(decoder, tokens, silence)
    changes = torch.zeros(len(states), len(states))
    for s in range(len(states)):
        others = []
        for letter in range(4, len(VOCABULARY)):  # behind < > @ #
            if letter != tokens[0, s]:
                changed = tokens.clone()
                changed[0, s] = letter
                others.append((states_of(decoder, changed, silence) - states).norm(dim=1))
        changes[:, s] = torch.stack(others).mean(dim=0)
    return changes / changes.amax(dim=1, keepdim=True)


def triangle(axis, values, cmap, title, ylabel, xlabel):
    """A matrix (T, T) over the letters of WORD, numbers in its cells; returns the picture."""
    picture = axis.imshow(values, cmap=cmap, vmin=0, vmax=1)
    for t in range(len(WORD)):
        for s in range(t + 1):
            colour = "white" if values[t, s] > 0.6 else "black"
            number = f"{values[t, s]:.2f}".lstrip("0")
            axis.text(s, t, number, ha="center", va="center", color=colour, fontsize=7)
    axis.set_xticks(range(len(WORD)), WORD)
    axis.set_yticks(range(len(WORD)), WORD)
    axis.set(title=title, ylabel=ylabel, xlabel=xlabel)
    return picture


def lstm_reading(decoder, which):
    """The LSTM unrolled over the letters of a word, and what its state holds of each."""
    word = word_tokens(decoder)
    states = states_of(decoder, *word)  # (T, D)
    n_units = min(24, states.shape[1])
    largest = states[:, :n_units].abs().max()
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
    shown = {"cmap": "RdBu", "vmin": -largest, "vmax": largest, "aspect": "auto"}
    picture = axes[0].imshow(states[:, :n_units].T, **shown)
    axes[0].set_xticks(range(len(WORD)), [f"{letter} →" for letter in WORD])
    axes[0].set(title=f"The state after each letter ({which})", xlabel="Letter read")
    axes[0].set(ylabel=f"The first {n_units} units of h")
    figure.colorbar(picture, ax=axes[0], label="Value of the unit")
    labels = f"What it holds ({which})", "State after this letter", "Earlier letter, changed"
    triangle(axes[1], influence(decoder, *word), "Blues", *labels)
    return figure


@contextmanager
def keeping_weights(attention):
    """In this block, a `MultiHeadAttention` keeps its weights: `attention.weights`."""
    attention.keeps_weights = True
    try:
        yield
    finally:
        attention.keeps_weights = False


@torch.no_grad()
def self_attention_weights(decoder, tokens, silence):
    """The weights of masked self-attention over a text: (1, T) -> (H, T, T)."""
    attention = decoder.self_attention.attention
    with keeping_weights(attention):
        decoder.eval()(tokens, silence)
    return attention.weights[0].cpu()


def transformer_reading(decoder, which):
    """Masked self-attention as a triangle of weights over the letters of a word, for each head."""
    weights = self_attention_weights(decoder, *word_tokens(decoder))  # (H, T, T)
    n_shown = min(2, len(weights))
    size = {"figsize": (4.2 * n_shown, 3.4), "squeeze": False}
    figure, axes = plt.subplots(1, n_shown, layout="constrained", **size)
    for head, axis in enumerate(axes[0]):
        title = f"Head {head + 1} of {len(weights)} ({which})"
        labels = title, "This letter looks …", "… at this one"
        picture = triangle(axis, weights[head], "Oranges", *labels)
    figure.colorbar(picture, ax=axes, label="Weight")
    return figure


# ------------------------------------------------------------------------------ curves and maps
def curves(decoder_name, epochs):
    """Losses, similarities and error rates of a decoder after each of its `epochs`."""
    panels = {
        "Cross-entropy (nats per token)": {"val_loss": "validation", "train_loss": "training"},
        "Similarity on validation": {key: SCORES[key] for key in SIMILARITIES},
        "Error rate on validation": {key: SCORES[key] for key in ("wer", "cer")},
    }
    figure, axes = plt.subplots(1, 3, figsize=(6.8, 3), layout="constrained")
    for axis, (ylabel, lines) in zip(axes, panels.items(), strict=True):
        for (key, label), style in zip(lines.items(), ("-", "--", ":"), strict=False):
            numbers = [row["epoch"] for row in epochs]
            values = [row[key] for row in epochs]
            axis.plot(numbers, values, style, color=COLOURS[decoder_name], label=label)
        axis.set(xlabel="Epoch", ylabel=ylabel, ylim=(0, None))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), frameon=False)
    axes[1].set(title=f"{NAMES[decoder_name]} decoder", ylim=(0, 1.02))
    return figure


@torch.no_grad()
def attention_map(model, clip, text):
    """Cross-attention weights (T, S), mean over heads, while `model` reads `text` (T + 1,).

    clip: its features (frames, 80).
    """
    attention = model.eval().decoder.cross_attention.attention_layer.attention
    device = device_of(model)
    n_frames = torch.tensor([len(clip)], device=device)
    features = utils.centre(clip.float())[None]  # (1, frames, 80)
    with keeping_weights(attention):
        model(features.to(device), n_frames, text[None].to(device))
    return attention.weights[0].mean(dim=0).cpu()  # of (1, H, T, S)


def attention_maps(models, clip, text):
    """The map of every model {title: model} on one clip, side by side; a row for each letter."""
    letters = [VOCABULARY[token] for token in text[1:].tolist()]
    seconds = len(clip) * utils.HOP / utils.SAMPLE_RATE
    size = {"figsize": (6.8, max(2.6, 0.11 * len(letters) + 0.8)), "squeeze": False}
    figure, axes = plt.subplots(1, len(models), sharey=True, layout="constrained", **size)
    for axis, (title, model) in zip(axes[0], models.items(), strict=True):
        weights = attention_map(model, clip, text)  # (T, S)
        extent = (0, seconds, len(weights) - 0.5, -0.5)
        brightness = PowerNorm(0.5, vmin=0, vmax=1)  # so that small weights are seen
        options = {"aspect": "auto", "cmap": "magma", "interpolation": "nearest"}
        picture = axis.imshow(weights, extent=extent, norm=brightness, **options)
        axis.set(title=title, xlabel="Time in the clip (s)")
        axis.set_yticks(range(len(letters)), [letter.replace(" ", "␣") for letter in letters])
        axis.tick_params(axis="y", labelsize=7, length=0)
    axes[0, 0].set(ylabel="Letter being written, from the top")
    figure.colorbar(picture, ax=axes, label="Weight")
    return figure


def marked(true, written):
    """`written` as HTML: what differs from the `true` text is bold, ‸ for missing letters."""
    parts = []
    for tag, _, _, start, stop in Levenshtein.opcodes(true, written):
        part = written[start:stop] or "‸"
        is_same = tag == "equal"
        parts.append(part if is_same else f"<b>{part}</b>")
    return "".join(parts)


# ------------------------------------------------------------------------------- in slow motion
@torch.no_grad()
def slow_motion(model, clip, max_letters):
    """Greedy decoding of one clip (frames, 80): a list of (text so far, [(letter, p)], weights).

    The three likeliest next letters, and the weights (S,) of cross-attention for the next letter,
    mean over heads.
    """
    attention = model.eval().decoder.cross_attention.attention_layer.attention
    device = device_of(model)
    features = utils.centre(clip.float())[None].to(device)  # (1, frames, 80)
    z, mask = model.encoder(features, torch.tensor([len(clip)], device=device))
    tokens, steps = [START], []
    while tokens[-1] != STOP and len(tokens) < max_letters:
        with keeping_weights(attention):
            logits = model.decoder(torch.tensor([tokens], device=device), z, mask)[0, -1]  # (V,)
        logits[[START, PAD]] = float("-inf")
        likeliest = logits.softmax(dim=-1).topk(3)
        letters = [VOCABULARY[i] for i in likeliest.indices.tolist()]
        weights = attention.weights[0, :, -1].mean(dim=0).cpu()  # (S,), of (1, H, T, S)
        written = "".join(VOCABULARY[token] for token in tokens)
        steps.append((written, list(zip(letters, likeliest.values.tolist(), strict=True)), weights))
        tokens.append(likeliest.indices[0].item())
    return steps


def slow_motion_rows(steps):
    """The steps as rows of a table: the text so far, the likeliest letters, where it listens."""
    rows = []
    for written, likeliest, weights in steps:
        cells = [f"`{letter.replace(' ', '␣')}` {p:.2f}" for letter, p in likeliest]
        rows.append([f"`{written}`", *cells, f"{FRAME * weights.argmax().item():.2f} s"])
    return rows


def animate(steps, clip, path, source):
    """The steps as an animated GIF at `path`: the path of attention grows, letter by letter.

    Above the clip (frames, 80) with a cursor where the decoder listens for the next letter, below
    the weights of all letters so far, and the text.
    """
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7.2, 4.6), height_ratios=(1, 1.6))
    figure.subplots_adjust(left=0.08, bottom=0.24, right=0.98, top=0.97, hspace=0.08)
    seconds = len(clip) * FRAME / 2
    extent = (0, seconds, 0, utils.N_MELS)
    top.imshow(clip.float().T, origin="lower", aspect="auto", extent=extent, cmap="gray_r")
    top.set(ylabel="Mel band", xticks=())
    bottom.set(ylabel="Letter", yticks=(), xlabel="Time in the clip (s)")
    place = {"x": 0.08, "family": "monospace", "fontsize": 13, "parse_math": False}
    text = figure.text(y=0.09, s="", **place)
    guesses = figure.text(y=0.03, s="", color="dimgray", **{**place, "fontsize": 9})
    figure.text(0.98, 0.01, source, fontsize=6, color="dimgray", ha="right", parse_math=False)
    path_so_far = torch.zeros(len(steps), len(steps[0][2]))  # (T, S)
    extent = (0, seconds, len(steps) - 0.5, -0.5)
    options = {"aspect": "auto", "cmap": "magma", "norm": PowerNorm(0.5, vmin=0, vmax=1)}
    picture = bottom.imshow(path_so_far, extent=extent, interpolation="nearest", **options)
    cursor = top.axvline(0, color="red", linewidth=2)
    frames = []
    for n, (written, likeliest, weights) in enumerate(steps):
        path_so_far[n] = weights
        picture.set_data(path_so_far)
        heard_at = FRAME * (weights.argmax().item() + 0.5)
        cursor.set_xdata([heard_at, heard_at])
        text.set_text((written + likeliest[0][0])[-60:])
        chances = "  ".join(f"{letter!r} {p:.2f}" for letter, p in likeliest)
        guesses.set_text(f"likeliest: {chances}")
        figure.canvas.draw()
        image = PIL.Image.fromarray(np.array(figure.canvas.buffer_rgba()))
        frames.append(image.convert("RGB"))
    few_colours = frames[-1].quantize(64)  # the same in all frames: a file of a third of the size
    frames = [frame.quantize(palette=few_colours, dither=PIL.Image.Dither.NONE) for frame in frames]
    durations = [150] * (len(frames) - 1) + [2_000]  # ms; the last one is held
    with runs.write_atomically(path) as temporary:
        frames[0].save(
            temporary, save_all=True, append_images=frames[1:], duration=durations, loop=0
        )
    plt.close(figure)
    return path
