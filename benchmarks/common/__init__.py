"""What the benchmarks share: models, real text, the floor in FLOPs, the check before timing, the reports."""

try:
    import matplotlib  # noqa: F401
    import tokenizers  # noqa: F401
    import tqdm  # noqa: F401
except ModuleNotFoundError as e:
    raise SystemExit(f"benchmarks need {e.name}: pip install 'bitune-kernels[bench]'") from None
