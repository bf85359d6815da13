"""Train the letter model, a language model of English that votes in transcribe.py's search.

    python -m tools.letters -metadata metadata.csv -data FOLDER

-metadata: LJ Speech's. Only transcripts of the course's training part are read, without those that
-data has for validation or test, whichever clip repeats them. Writes OUT/models/letters.pt and
prints after each epoch how many bits a letter of the course's validation part takes.
"""

import math
from pathlib import Path

import decoding
import runs
import utils

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

BATCH = 32
FIRST_VAL_CLIP = "LJ037-0213"  # in the course's split of all of LJ Speech


def held_out(data):
    """Ids and texts of the validation and test clips in the folder `data`: not for training.

    The texts, too, because a few sentences of LJ Speech are read in several clips.
    """
    rows, _ = utils.load_ljspeech(data)
    clips = [*rows["val"], *rows["test"]]
    return {clip for clip, _, _ in clips} | {text for _, text, _ in clips}


def split_texts(metadata, data):
    """(training, validation) texts as tokens, by the course's split of all of LJ Speech."""
    left_out = held_out(data)
    training, validation = [], []
    for clip, _, text in utils.read_metadata(metadata):
        if clip < FIRST_VAL_CLIP and not {clip, text} & left_out:
            training.append(torch.tensor(utils.encode(text)))
        elif FIRST_VAL_CLIP <= clip < utils.FIRST_TEST_CLIP:
            validation.append(torch.tensor(utils.encode(text)))
    return training, validation


def loss_of(model, texts):
    """Cross-entropy of predicting every next letter, in nats per token."""
    tokens, _ = utils.pad(texts, utils.PAD)  # (B, L)
    logits, _ = model(tokens[:, :-1])
    targets = tokens[:, 1:].flatten()
    return F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=utils.PAD)


def train(training, validation, epochs):
    """A trained LetterModel."""
    model = decoding.LetterModel()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    n_steps = epochs * math.ceil(len(training) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, n_steps, pct_start=0.1)
    lengths = [len(text) for text in training]
    for epoch in range(1, epochs + 1):
        model.train()
        batches = utils.batches_by_length(lengths, BATCH)
        for indices in tqdm(batches, f"epoch {epoch}", leave=False, disable=runs.QUIET):
            optimizer.zero_grad()
            loss_of(model, [training[i] for i in indices]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.inference_mode():
            bits = loss_of(model, validation).item() / math.log(2)
        print(f"epoch {epoch}  {bits:.3f} bits per letter on validation", flush=True)
    return model


def make_parser():
    parser = runs.ArgumentParser(__doc__)
    parser.flag("metadata", type=Path, required=True, help="metadata.csv of all of LJ Speech")
    parser.flag("data", required=True, help="its validation and test clips are left out")
    parser.flag("out", type=Path, default="report", help="folder to write to")
    parser.flag("epochs", type=runs.number(int, 1), default=5, help="passes over the transcripts")
    return parser


def main(args):
    """Train, and save the weights as float16."""
    runs.configure_seed(0)
    model = train(*split_texts(args.metadata, args.data), args.epochs)
    weights = {name: tensor.half() for name, tensor in model.state_dict().items()}
    path = args.out / "models" / "letters.pt"
    runs.save_checkpoint(path, {"model": weights, "vocabulary": utils.VOCABULARY})
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    runs.run_script(main, make_parser())
