"""How fast Q3 trains and decodes, per clip, against plain reference code.

    python -m bench.q3        three to ten minutes

The clips are random features, as long as LJ Speech's clips (6.6 s on average), with random texts of
15 letters a second. The reference is the same model as one writes it first: float32, every clip
padded to the 2,754 frames of the handed-out code, padding not masked; decoding reads the whole text
again for each letter. Both are measured in turn, three rounds. Printed are the median time of each,
and their ratio with its least and greatest value.
"""

import time
from dataclasses import replace
from statistics import median

import decoding
import runs
import utils

import torch
import torch.nn.functional as F

N_CLIPS = 64
N_ROUNDS = 3
REFERENCE_FRAMES = 2_754
q3 = runs.load_definitions(runs.ROOT / "hw2-q3.ipynb", batch_size=32, ctc_weight=0.0)
masked_attention = q3.attention


# ------------------------------------------------------------------------------------- the inputs
def random_corpus(seconds):
    """Clips of random features with random texts; seconds: the length of each clip."""
    features, tokens = [], []
    for s in seconds:
        features.append(torch.randn(int(s * utils.SAMPLE_RATE / utils.HOP), utils.N_MELS))
        letters = torch.randint(4, len(utils.VOCABULARY), (int(15 * s),))
        tokens.append(torch.cat([torch.tensor([utils.START]), letters, torch.tensor([utils.STOP])]))
    rows = [None] * len(features)
    return q3.Corpus({}, {"train": rows}, {"train": features}, {"train": tokens})


def pad_to_the_reference(corpus):
    """The same clips, all padded with silence to one length, as in the handed-out code."""
    clips = corpus.features["train"]
    longest = [F.pad(clip, (0, 0, 0, REFERENCE_FRAMES - len(clip))) for clip in clips]
    return replace(corpus, features={"train": longest})


def plain_attention(Q, K, V, mask=None):
    """Attention that sees padding too: of the masks only the causal one, (T, T), is kept."""
    return masked_attention(Q, K, V, mask if mask is not None and mask.ndim == 2 else None)


# ----------------------------------------------------------------------------------- measurements
def new_model(decoder_name, corpus):
    torch.manual_seed(0)
    return q3.SpeechToText(q3.sizes_for(corpus, decoder_name, q3.settings))


def training(decoder_name, corpus, settings, batches):
    """A function that trains on `batches` and returns its seconds per clip."""
    model = new_model(decoder_name, corpus).train()
    optimizer, _ = q3.new_optimizer(model, settings, n_steps=100)

    def measure():
        started = time.perf_counter()
        for indices in batches:
            q3.train_batch(model, optimizer, q3.get_batch(corpus, "train", indices), settings)
        return (time.perf_counter() - started) / sum(map(len, batches))

    return measure


def with_cache(decoder, z, mask, max_tokens):
    """Greedy decoding with the KV cache and its check, as evaluation does it."""
    return decoding.greedy_decode_with_cache(q3.greedy_decode, decoder, z, mask, max_tokens)


def writing(decoder_name, corpus, settings, indices, decode):
    """A function that writes 100 letters for each clip and returns its seconds per clip.

    decode: takes what the notebook's `greedy_decode` takes.
    """
    model = new_model(decoder_name, corpus).eval()
    with torch.no_grad():
        model.decoder.to_logits.bias[utils.STOP] = -100.0  # so that no text ends before 100
    features, n_frames, _ = q3.get_batch(corpus, "train", indices)

    def measure():
        started = time.perf_counter()
        with torch.inference_mode(), q3.autocast(settings):
            z, mask = model.encoder(features, n_frames)
            decode(model.decoder, z, mask, 100)
        return (time.perf_counter() - started) / len(indices)

    return measure


def compare(decoder_name, what, ours, reference):
    """Measure both in turn, after one round to warm up; prints the medians and the ratio."""
    times, reference_times = [], []
    for n in range(1 + N_ROUNDS):
        q3.attention = masked_attention
        mine = ours()
        q3.attention = plain_attention
        theirs = reference()
        if n > 0:
            times.append(mine)
            reference_times.append(theirs)
    ratios = [theirs / mine for mine, theirs in zip(times, reference_times, strict=True)]
    ratio = median(reference_times) / median(times)
    spread = f"{ratio:.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
    milliseconds = f"{1e3 * median(times):.1f} ms, reference {1e3 * median(reference_times):.1f} ms"
    print(f"{decoder_name} {what}: {milliseconds}; ratio {spread}", flush=True)


def main():
    torch.manual_seed(0)
    seconds = (6.6 + 2.2 * torch.randn(N_CLIPS)).clamp(1.1, 10.1).tolist()
    corpus = random_corpus(seconds)
    padded = pad_to_the_reference(corpus)
    machine = runs.environment()
    print(f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}")
    print(
        f"bfloat16: {q3.uses_bf16(q3.settings)}; {sum(seconds) / N_CLIPS:.1f} s a clip on average"
    )

    settings, plain = q3.settings, runs.changed(q3.settings, bf16=0)
    batches = utils.batches_by_length(list(map(len, corpus.features["train"])), settings.batch_size)
    few = [torch.arange(4)]
    for name in ("lstm", "transformer"):
        ours = training(name, corpus, settings, batches)
        compare(name, "training", ours, training(name, padded, plain, few))
        ours = writing(name, corpus, settings, torch.arange(N_CLIPS), with_cache)
        reference = writing(name, padded, plain, torch.arange(4), q3.greedy_decode)
        compare(name, "decoding", ours, reference)


if __name__ == "__main__":
    main()
