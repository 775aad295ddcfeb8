"""BituneConfig: what each variant means, what is refused, the json file; and what an import loads."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from peft import IA3Config, LoraConfig

import bitune_kernels
from bitune_kernels import BituneConfig
from bitune_kernels.config import CONFIG_NAME, VARIANTS


def config(**options):
    return BituneConfig(**{"peft": None} | options)


def test_defaults_are_the_paper():
    default = BituneConfig()
    assert (default.peft.r, default.peft.lora_alpha, default.peft.target_modules) == (8, 1, "all-linear")
    assert (default.variant, default.mixing, default.mixing_granularity) == ("bitune", "abs", "layer")
    assert (default.theta_init, default.skip_bidir, default.use_fused) == (0.01, 0, True)
    assert BituneConfig().peft is not default.peft


# the paper's ablations and two of ours: streams, an adapter of its own for the bidirectional stream, its mask
ABLATIONS = {
    "bitune": (2, True, "full"),
    "naive_bidir": (1, False, "full"),
    "no_mixing": (1, True, "full"),
    "only_causal": (2, True, "causal"),
    "shared_weights": (2, False, "full"),
    "anti_causal": (2, True, "anti_causal"),
    "single_stream": (1, False, "full"),
    "single_stream_dual": (1, True, "full"),
}


def test_every_variant_is_listed():
    assert set(VARIANTS) == set(ABLATIONS)


@pytest.mark.parametrize("variant", ABLATIONS)
def test_variants(variant):
    num_streams, separate_adapters, mask = ABLATIONS[variant]
    made = config(variant=variant)
    assert (made.num_streams, made.separate_adapters) == (num_streams, separate_adapters)
    assert made.stream_masks(3) == (mask,) * 3


@pytest.mark.parametrize(
    ("variant", "skip", "masks"),
    [
        ("bitune", 0, "full full full full"),
        ("bitune", 1, "causal full full full"),
        ("bitune", 4, "causal causal causal causal"),
        ("bitune", -1, "full causal causal causal"),
        ("bitune", -3, "full full full causal"),
        ("bitune", -4, "full full full full"),
        ("anti_causal", 2, "causal causal anti_causal anti_causal"),
        ("anti_causal", -2, "anti_causal anti_causal causal causal"),
        ("only_causal", 2, "causal causal causal causal"),
    ],
)
def test_skip_bidir(variant, skip, masks):
    assert config(variant=variant, skip_bidir=skip).stream_masks(4) == tuple(masks.split())


@pytest.mark.parametrize("skip", [5, -5])
def test_skip_bidir_beyond_the_layers_is_refused(skip):
    with pytest.raises(ValueError, match=f"^skip_bidir: expected at most the 4 layers, got {skip}"):
        config(skip_bidir=skip).stream_masks(4)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("variant", "607", ValueError),
        ("variant", None, ValueError),
        ("mixing", "tanh", ValueError),
        ("mixing_granularity", "token", ValueError),
        ("backend", "fastest", ValueError),
        ("theta_init", 0, ValueError),
        ("theta_init", -0.01, ValueError),
        ("theta_init", float("nan"), ValueError),
        ("theta_init", float("inf"), ValueError),
        ("theta_init", "0.01", TypeError),
        ("theta_init", True, TypeError),
        ("beta_init", 0, ValueError),
        ("beta_init", 1, ValueError),
        ("beta_init", 0.9, ValueError),  # the default variant has no beta
        ("beta_init", None, TypeError),
        ("dynamic_mixing", 1, TypeError),
        ("skip_bidir", 1.0, TypeError),
        ("skip_bidir", True, TypeError),
        ("use_fused", 1, TypeError),
        ("loss_chunk_rows", 0, ValueError),
        ("loss_chunk_rows", True, TypeError),
        ("loss_chunk_rows", 8.0, TypeError),
        ("turns", "all", ValueError),
        ("peft", {"r": 8}, TypeError),
        ("peft", LoraConfig, TypeError),
    ],
)
def test_bad_fields_are_refused(field, value, error):
    with pytest.raises(error, match=f"^{field}: expected"):
        config(**{field: value})


@pytest.mark.parametrize("peft", [LoraConfig(r=4), IA3Config(), None], ids=["lora", "ia3", "full"])
def test_json_round_trip(tmp_path, peft):
    changed = {
        "variant": "single_stream_dual",
        "beta_init": 0.9,
        "dynamic_mixing": True,
        "mixing": "relu",
        "mixing_granularity": "head",
        "theta_init": 0.1,
        "skip_bidir": -2,
        "use_fused": False,
        "backend": "reference",
        "turns": "recompute",
        "loss": "token",  # the other one goes without chunks
        "loss_chunk_rows": 256,
    }
    saved = BituneConfig(peft=peft, **changed)
    saved.save(tmp_path)
    written = json.loads((tmp_path / CONFIG_NAME).read_text())
    not_saved = {"use_fused", "backend", "loss_chunk_rows"}
    kept = {name: x for name, x in changed.items() if name not in not_saved}
    assert written == kept | {"peft_type": None if peft is None else peft.peft_type.value}
    assert set(changed) == set(saved.__dataclass_fields__) - {"peft"}, "a new field is not in this test"
    adapter = LoraConfig()
    loaded = BituneConfig.load(tmp_path, adapter)
    assert loaded.to_dict() == written | {"peft_type": None if peft is None else "LORA"}
    assert loaded.peft is (None if peft is None else adapter)
    assert BituneConfig.load(tmp_path, adapter, backend="sdpa").backend == "sdpa"
    with pytest.raises(ValueError, match="loss_chunk_rows: expected at least 1"):
        BituneConfig.load(tmp_path, adapter, loss_chunk_rows=0)


def test_unknown_field_is_refused(tmp_path):
    config().save(tmp_path)
    path = tmp_path / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_passes": 4}))
    with pytest.raises(ValueError, match="unknown fields num_passes"):
        BituneConfig.load(tmp_path, None)


def test_bad_value_in_the_file_is_refused(tmp_path):
    config().save(tmp_path)
    path = tmp_path / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mixing": "tanh"}))
    with pytest.raises(ValueError, match=r"^mixing: expected one of abs, relu, got 'tanh'"):
        BituneConfig.load(tmp_path, None)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(CONFIG_NAME)):
        BituneConfig.load(tmp_path, None)


def loaded_in_a_fresh_process(code):
    """The names of the heavy packages that the code leaves in sys.modules."""
    script = f"{code}\nimport sys\nprint(*({{'torch', 'transformers', 'peft', 'triton'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_loads_nothing():
    assert loaded_in_a_fresh_process("import bitune_kernels") == set()


def test_attention_loads_torch_only():
    use = "from bitune_kernels.testing import CASES, run_case; run_case(CASES[3], 'auto', torch.float32)"
    assert loaded_in_a_fresh_process(f"import torch; {use}") == {"torch"}


def test_public_names_exist():
    for name in bitune_kernels.__all__:
        assert getattr(bitune_kernels, name) is not None and name in dir(bitune_kernels)
    # what type checkers read is what is loaded
    tree = ast.parse(Path(bitune_kernels.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = {alias.name: statement.module for statement in block.body for alias in statement.names}
    assert imported == bitune_kernels._MODULES and {*imported, "__version__"} == set(bitune_kernels.__all__)
    with pytest.raises(AttributeError, match="no attribute 'bitune'"):
        _ = bitune_kernels.bitune
