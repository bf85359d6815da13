"""A page to speak into, which `make demo` opens in the browser.

It is served to this machine only, fetches nothing from elsewhere and keeps nothing. The text comes
from the model and the search of transcribe.py. Below it one sees where the decoder listened while
it wrote each letter: its cross-attention weights, a row for each letter.
"""

import os
import tempfile

import plots
import runs
import transcribe
import utils

import torch

Q3 = runs.load_definitions(transcribe.NOTEBOOK, device="cpu")

MAX_ROWS = 600  # of a picture, about 40 s of speech; browsers refuse much higher ones


def stretches_that_fit(written):
    """The first stretches (start, stop, text) that fit into one picture, without empty texts."""
    fitting, n_rows = [], 0
    for start, stop, text in written:
        n_rows += len(text) + 8
        if n_rows > MAX_ROWS:
            break
        if text:
            fitting.append((start, stop, text))
    return fitting


def picture(model, samples, written):
    """The attention in each stretch of speech (start, stop, text), with a row for each letter."""
    plt = utils.pyplot()
    heights = [len(text) + 8 for _, _, text in written]
    figure, axes = plt.subplots(
        len(written),
        figsize=(8, 0.1 * sum(heights)),
        layout="constrained",
        squeeze=False,
        height_ratios=heights,
    )
    for axis, (start, stop, text) in zip(axes[:, 0], written, strict=True):
        tokens = torch.tensor(utils.encode(text))
        weights = plots.attention_map(model, utils.log_mel(samples[start:stop]), tokens)  # (T, S)
        ends = (start / utils.SAMPLE_RATE, stop / utils.SAMPLE_RATE)
        extent = (*ends, len(weights) - 0.5, -0.5)
        axis.imshow(weights.sqrt(), extent=extent, aspect="auto", cmap="magma", vmin=0, vmax=1)
        axis.set_yticks(range(len(weights)), [*text.replace(" ", "␣"), "end"], fontsize=6)
        axis.set(xlabel="Time in the recording (s)", ylabel="Letter being written")
    end = written[-1][1] / utils.SAMPLE_RATE
    axes[0, 0].set_title(f"Where the decoder listened for each letter (up to {end:.0f} s)")
    plt.close(figure)
    return figure


def text_and_picture(model, path):
    """Yield the text of a recording, longer with each stretch of speech, and at last a figure, too.

    The figure shows where the decoder listened, as far as it fits. If the recording has no text,
    what is wrong with it stands in brackets in its place.
    """
    try:
        samples = utils.read_audio(path, name="The recording")
    except runs.UserError as error:
        yield f"({error})", None
        return
    written = []
    for stretch in transcribe.write_stretches(model, samples):
        written.append(stretch)
        yield transcribe.text_of(written), None
    text = transcribe.text_of(written)
    fitting = stretches_that_fit(written)
    if not text:
        yield f"({transcribe.why_no_text(written)})", None
    elif fitting:
        yield text, picture(model, samples, fitting)


# ---------------------------------------------------------------------------------------- the page
EXAMPLES = sorted(transcribe.MODEL.parent.glob("synthetic-voice-*.flac"))


def about_the_model():
    """What the model that comes with the clone learned from, and how often it errs."""
    result = runs.load_result(runs.ROOT / "report", "q3-model-transformer")
    scores = result["recordings"]["clips as they are"]
    n_real = result["trained"]["data"]["counts"]["train"]
    return (
        f"The model learned from a synthetic voice and from {n_real} sentences read by one woman "
        f"(LJ Speech). Of {scores['n']} other sentences that she reads, it gets "
        f"{100 * scores['wer']:.0f} % of the words wrong; other voices and noise cost more."
    )


def import_gradio():
    """The package gradio, which only this page needs; UserError where it is not installed."""
    try:
        import gradio
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise runs.UserError("the package gradio is missing; `make demo` installs it.") from error
    return gradio


def main(args):
    model = Q3.load_model(args.model)
    with tempfile.TemporaryDirectory() as folder:  # recordings go when the page closes
        os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False")
        gradio = import_gradio()

        def answer(path):
            yield "", None
            if path:
                yield from text_and_picture(model, path)

        title = "Speech to text, letter by letter"
        with gradio.Blocks(title=title) as page:
            about = about_the_model() if args.model == transcribe.MODEL else f"Model: {args.model}"
            gradio.Markdown(f"# {title}\n{about} Nothing leaves this machine.")
            sound = gradio.Audio(
                sources=["microphone", "upload"],
                type="filepath",
                label="Speak, or drop a sound file",
                buttons=[],
            )
            gradio.Examples(EXAMPLES, sound, label="Or click one of these (a synthetic voice)")
            text = gradio.Textbox(label="Text", buttons=[])
            plot = gradio.Plot(show_label=False)
            sound.change(answer, sound, [text, plot])
        fonts = {"font": ["sans-serif"], "font_mono": ["monospace"]}  # other fonts would be fetched
        page.launch(
            server_name="127.0.0.1",
            share=False,
            run_history=False,
            inbrowser=not args.no_browser,
            theme=gradio.themes.Default(**fonts),
            footer_links=[],
        )


def make_parser():
    parser = runs.ArgumentParser(__doc__)
    parser.flag("model", default=transcribe.MODEL, help="a checkpoint of the notebook")
    parser.flag("no_browser", action="store_true", help="only say where the page is")
    return parser


if __name__ == "__main__":
    runs.run_script(main, make_parser(), after_interrupt="the page is closed")
