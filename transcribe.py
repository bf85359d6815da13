"""Write down what is said in sound files, with a trained model of Question 3.

    python transcribe.py a.wav b.flac ...

The model is the one that comes with the clone, or a checkpoint of the notebook (-model). Prints one
line for each file, in the order given: its path, a tab, its text; nothing else on stdout. Takes any
format and sample rate that soundfile reads. Recordings of more than ten seconds are cut at
silences, because the model never heard a longer clip.

The text is found by a beam search in which the decoder and the encoder's CTC layer vote together
(Hori, Watanabe and Hershey 2017); the scores of the assignment use greedy decoding, which is in
the notebook.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
import runs
import utils
from runs import UserError
from tools.definitions import load_definitions
from utils import PAD, START, STOP

import numpy as np
import torch
from tqdm import tqdm

MODEL = Path(__file__).resolve().parent / "report" / "models" / "q3.pt"
LONGEST_PIECE = 10.0  # seconds
SHORTEST_PIECE = 4.0  # seconds, where a longer recording is cut
BEAM = 8  # texts that are kept at each step
CTC_SHARE = 0.4  # of the CTC layer's vote; the decoder has the rest


# ----------------------------------------------------------------------------------- beam search
class PrefixScore:
    """How likely the CTC layer finds each continuation of some texts.

    The score of a text g is log of the sum over all alignments that begin with g. For every text
    two sums over alignments of its letters to the first s frames are kept: of those that end in a
    letter, and of those that end in a blank. log_p (S, V) holds the layer's log-probabilities.
    """

    def __init__(self, log_p, blank=PAD):
        self.log_p = log_p  # (S, V)
        self.blank = blank
        n_frames = len(log_p)
        no_letter = np.full((1, n_frames + 1), -np.inf)  # (1, S + 1): the empty text
        only_blanks = np.concatenate([[0.0], log_p[:, blank].cumsum()])[None]
        self.sums = no_letter, only_blanks  # of each text: (W, S + 1)

    def continuations(self, last):
        """Scores (W, V) of each text with each token behind it, and the sums of the longer texts.

        last (W,): the last token of each text. STOP ends a text: its score is that of the whole.
        """
        ends_in_letter, ends_in_blank = self.sums  # (W, S + 1)
        n_texts, n_frames, n_tokens = len(last), *self.log_p.shape
        is_repeated = last[:, None] == np.arange(n_tokens)  # (W, V): needs a blank between
        scores = np.full((n_texts, n_tokens), -np.inf)
        letter = np.full((n_texts, n_tokens, n_frames + 1), -np.inf)
        blank = np.full((n_texts, n_tokens, n_frames + 1), -np.inf)
        for s in range(n_frames):
            before = np.where(is_repeated, -np.inf, ends_in_letter[:, s, None])
            before = np.logaddexp(before, ends_in_blank[:, s, None])  # (W, V)
            begins = before + self.log_p[s]  # the new letter begins in frame s
            stays = letter[:, :, s] + self.log_p[s]  # it goes on from frame s - 1
            letter[:, :, s + 1] = np.logaddexp(begins, stays)
            ended = np.logaddexp(letter[:, :, s], blank[:, :, s])
            blank[:, :, s + 1] = ended + self.log_p[s, self.blank]
            scores = np.logaddexp(scores, begins)
        scores[:, STOP] = np.logaddexp(ends_in_letter[:, -1], ends_in_blank[:, -1])
        return scores, (letter, blank)

    def keep(self, sums, texts, tokens):
        """Go on with these texts, each with its token behind it."""
        letter, blank = sums
        self.sums = letter[texts, tokens], blank[texts, tokens]


@torch.inference_mode()
def beam_search(model, features, max_tokens, beam=BEAM, ctc_share=CTC_SHARE):
    """The likeliest text of one clip (T, n_mels), as tokens without START and STOP.

    Both votes only fall as a text grows, so the search is over when no unfinished text is better
    than the best finished one.
    """
    device = features.device
    z, mask = model.encoder(features[None], torch.tensor([len(features)], device=device))
    log_p_ctc = model.ctc(z)[0].float().log_softmax(dim=-1)  # (S, V)
    prefix_score = PrefixScore(log_p_ctc.cpu().double().numpy())

    texts = torch.tensor([[START]])  # (W, L)
    decoder_scores = np.zeros(1)  # (W,)
    state = model.new_state()
    best_text, best_score = texts[0], -math.inf
    for _ in range(max_tokens):
        n_texts = len(texts)
        newest = texts[:, -1:].to(device)  # (W, 1)
        z_of_each = z.expand(n_texts, -1, -1)
        mask_of_each = mask.expand(n_texts, -1, -1, -1)
        logits = model.decoder(newest, z_of_each, mask_of_each, state)  # (W, 1, V)
        log_p = logits[:, -1].float().log_softmax(dim=-1)  # (W, V), of the next token
        decoder = decoder_scores[:, None] + log_p.cpu().double().numpy()
        ctc, sums = prefix_score.continuations(texts[:, -1].numpy())
        scores = (1 - ctc_share) * decoder + ctc_share * ctc  # (W, V)
        scores[:, [START, PAD]] = -np.inf

        finished = scores[:, STOP].argmax()
        if scores[finished, STOP] > best_score:
            best_text, best_score = texts[finished], scores[finished, STOP]
        scores[:, STOP] = -np.inf
        kept = scores.ravel().argsort()[::-1][:beam]
        kept = kept[scores.ravel()[kept] > best_score]
        if len(kept) == 0:
            break
        parents, tokens = np.unravel_index(kept, scores.shape)
        longer = torch.from_numpy(tokens)[:, None]
        texts = torch.cat([texts[torch.from_numpy(parents)], longer], dim=1)
        decoder_scores = decoder[parents, tokens]
        prefix_score.keep(sums, parents, tokens)
        state.keep(torch.from_numpy(parents).to(device))
    return best_text[1:].tolist()


# ------------------------------------------------------------------------------------- recordings
def cut_at_silences(samples, longest=LONGEST_PIECE, shortest=SHORTEST_PIECE):
    """Pieces of at most `longest` seconds of samples (n,), cut where it is quietest."""
    pieces = []
    window = utils.SAMPLE_RATE // 10
    while len(samples) > longest * utils.SAMPLE_RATE:
        start, stop = int(shortest * utils.SAMPLE_RATE), int(longest * utils.SAMPLE_RATE)
        power = samples[start:stop].square()
        loudness = torch.nn.functional.avg_pool1d(power[None], window, stride=window // 4)[0]
        quietest = start + int(loudness.argmin()) * (window // 4) + window // 2
        pieces.append(samples[:quietest])
        samples = samples[quietest:]
    if len(samples) >= utils.N_FFT or not pieces:
        pieces.append(samples)
    return pieces


def load_model(path, device="cpu"):
    """The model of a checkpoint of the notebook, ready to transcribe.

    UserError where there is none, or it is damaged.
    """
    state = runs.load_checkpoint(path)
    if state is None:
        raise UserError(f"there is no model {path}; name one with -model.")
    definitions = load_definitions()
    try:
        model = definitions["SpeechToText"](definitions["ModelSizes"](**state["sizes"]))
        model.load_state_dict({name: tensor.float() for name, tensor in state["model"].items()})
    except (KeyError, TypeError, RuntimeError) as error:
        problem = "is no model of this notebook, or of one that was edited since"
        raise UserError(f"{path} {problem}; name another with -model.") from error
    return model.to(device).eval()


def transcribe(model, path):
    """What `model` writes down for the sound file `path`; UserError if that cannot be read."""
    model.eval()
    device = next(model.parameters()).device
    max_tokens = 250
    if hasattr(model.decoder, "positions"):
        max_tokens = len(model.decoder.positions) - 1
    texts = []
    samples = utils.read_audio(path, advice="name another sound file")
    for piece in cut_at_silences(samples):
        features = utils.centre(utils.log_mel(piece)).to(device)  # (T, 80)
        tokens = beam_search(model, features, max_tokens)
        texts.append(utils.decode(tokens).strip())
    return " ".join(text for text in texts if text)


# ----------------------------------------------------------------------------------- command line
def make_parser():
    parser = runs.ArgumentParser(__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="sound files")
    parser.flag("model", type=Path, default=MODEL, help="a checkpoint of the notebook")
    parser.flag(
        "device", type=runs.device_name, default="auto", help="auto, cpu, cuda, cuda:1 or mps"
    )
    return parser


def main(args):
    """Print a line for each file; those that cannot be read are named at the end."""
    model = load_model(args.model, runs.pick_device(args.device))
    problems = []
    for path in tqdm(args.files, "transcribing", leave=False, disable=runs.QUIET):
        try:
            text = transcribe(model, path)
        except UserError as error:
            problems.append(str(error))
            continue
        tqdm.write(f"{path}\t{text}", file=sys.stdout)
        sys.stdout.flush()
    if problems:
        raise UserError(" ".join(problems))


if __name__ == "__main__":
    runs.run_script(main, make_parser())
