"""``bitune plot``: the mixing coefficients of a trained model, and what its two streams make of a prompt."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from .load import (
    adapter_folder,
    add_adapter_option,
    add_format_option,
    add_model_options,
    encode,
    load_model,
    load_tokenizer,
    max_tokens,
    prompt_format,
)

_FORMATS = (".png", ".pdf", ".svg")


def add(commands) -> None:
    parser = commands.add_parser(
        "plot",
        help="draw mixing coefficients, attention or the streams' distance",
        description="Figures of a trained model, into one file each.",
        epilog="example: bitune plot alpha --adapter runs/answers --output alpha.png",
    )
    figures = parser.add_subparsers(dest="figure", required=True)
    alpha = figures.add_parser(
        "alpha",
        help="alpha and |theta| of each layer",
        description="alpha and |theta| of each layer of a saved model; for a run of bitune train also over its steps.",
        epilog="example: bitune plot alpha --adapter runs/answers --output alpha.png",
    )
    add_adapter_option(alpha)
    alpha.set_defaults(run=_alpha)
    attention = figures.add_parser(
        "attention",
        help="where the tokens of a prompt attend, in each stream",
        description="The attention matrix of each stream of a prompt, averaged over heads and layers.",
        epilog="example: bitune plot attention --model google/gemma-2b --adapter runs/answers "
        "--prompt 'Is the sky blue?' --output attention.png",
    )
    attention.set_defaults(run=_attention)
    streams = figures.add_parser(
        "streams",
        help="how far the streams' keys and values lie apart",
        description="|bidir - causal| / |causal| of the keys and of the values of a prompt, in each layer.",
        epilog="example: bitune plot streams --model google/gemma-2b --adapter runs/answers "
        "--prompt 'Is the sky blue?' --output streams.png",
    )
    streams.set_defaults(run=_streams)
    for figure in (attention, streams):
        add_model_options(figure)
        figure.add_argument("--prompt", required=True, help="of at least two tokens")
        add_format_option(figure)
    for figure in (alpha, attention, streams):
        figure.add_argument("--output", required=True, help="file to write: .png, .pdf or .svg")


def _alpha(given) -> None:
    _check_output(given.output)
    mixing = _load_mixing(adapter_folder(given.adapter))
    history = Path(given.adapter, "alpha.csv")
    rows = None
    if history.is_file():
        from ..training.alpha import read_alpha_csv

        try:
            rows = read_alpha_csv(history)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--adapter: expected the table of bitune train in {history}; {error!r}") from None

    from ..plots import plot_mixing

    plot_mixing(mixing, given.output, rows)
    print(given.output)


def _load_mixing(folder: Path):
    """The mixing coefficients of a saved model, without its base model."""
    from ..config import BituneConfig
    from ..mixing import MixingCoefficients, read_mixing

    config = BituneConfig.load(folder, None)
    if not config.mixed:
        raise ValueError(f"--adapter: expected a variant that mixes two streams, got {config.variant!r} in {folder}")
    state = read_mixing(folder)
    expected = [f"theta_{name}" for name in sorted(config.mixed)]
    if sorted(name for name in state if name.startswith("theta_")) != sorted(expected):
        raise ValueError(f"--adapter: expected {', '.join(expected)} in {folder}, got {sorted(state)}")
    layers, *_ = state[expected[0]].shape
    heads = {name: state[f"theta_{name}"].shape[-1] for name in config.mixed}  # where there is one theta for each
    count = sum(name.startswith("gate.") for name in state)
    gates = [len(state[f"gate.{layer}"]) for layer in range(count)] if config.dynamic_mixing else None
    mixing = MixingCoefficients.from_config(
        config, layers, heads.get("k"), num_heads_q=heads.get("beta"), gate_features=gates
    )
    mixing.load(folder)
    return mixing


def _attention(given) -> None:
    tokenizer, tokens, model = _load(given)
    from ..modeling import stream_attention
    from ..plots import plot_attention

    matrices = {name: layers.mean(0) for name, layers in stream_attention(model, _tensor(tokens, model)).items()}
    plot_attention(matrices, [tokenizer.decode([token]) for token in tokens[:-1]], given.output)
    print(given.output)


def _streams(given) -> None:
    _, tokens, model = _load(given)
    from ..modeling import stream_distance
    from ..plots import plot_distance

    plot_distance(stream_distance(model, _tensor(tokens, model)), given.output)
    print(given.output)


def _load(given):
    _check_output(given.output)
    tokenizer, limit = load_tokenizer(given), max_tokens(given)
    try:
        tokens = encode(given.prompt, tokenizer, prompt_format(given))
    except ValueError as error:
        raise ValueError(f"--prompt: {error}") from None
    if not 2 <= len(tokens) <= (limit or len(tokens)):
        raise ValueError(f"--prompt: expected 2 to {limit} tokens, got {len(tokens)}")
    return tokenizer, tokens, load_model(given)


def _tensor(tokens: list[int], model):
    import torch

    return torch.tensor([tokens], device=model.device)


def _check_output(path: str) -> None:
    if find_spec("matplotlib") is None:
        raise ValueError("bitune plot: expected matplotlib, got none; pip install 'bitune-kernels[train]' brings it")
    if Path(path).suffix not in _FORMATS:
        raise ValueError(f"--output: expected a file that ends in {', '.join(_FORMATS)}, got {path}")
    if not Path(path).absolute().parent.is_dir():
        raise FileNotFoundError(f"--output: expected a file in a folder that exists, got {path}")
