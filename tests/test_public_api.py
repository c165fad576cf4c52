"""What `import clae_fast` gives, and what it costs."""

import inspect
import subprocess
import sys

import pytest
import torch

import clae_fast

LEAN = """
import sys, time
import torch
HEAVY = ("triton", "torchvision", "matplotlib", "mlxtend")
before = set(sys.modules)
start = time.perf_counter()
import clae_fast
seconds = time.perf_counter() - start
new = set(sys.modules) - before
print(seconds, torch.cuda.is_initialized(),
      sorted(m for m in new if m.split(".")[0] in HEAVY),
      sorted(m for m in new if m.startswith("clae_fast.") and "pretraining" in m),
      "clae_fast_C" in str(torch.ops.loaded_libraries))
"""


def test_import_is_lean():
    """Under 0.3 s beyond torch; neither triton nor CUDA nor the extension is touched."""
    outs = [
        subprocess.run(
            [sys.executable, "-c", LEAN], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(3)
    ]
    seconds = min(float(out.split()[0]) for out in outs)
    assert outs[0].split(" ", 1)[1].strip() == "False [] [] False"
    assert seconds < 0.3, f"import took {seconds:.3f} s"


def test_names():
    assert clae_fast.__all__ == sorted(clae_fast.__all__)
    for name in clae_fast.__all__:
        assert hasattr(clae_fast, name)
    public = {n for n in vars(clae_fast) if not n.startswith("_")}
    modules = {n for n in public if inspect.ismodule(getattr(clae_fast, n))}
    assert public - modules == set(clae_fast.__all__) - {"__version__"}


def test_signatures_are_the_documented_ones():
    text = {
        name: str(inspect.signature(getattr(clae_fast, name)))
        for name in ("nt_xent_loss", "info_nce_loss", "uel_loss", "clip_loss")
    }
    assert "(z_i: torch.Tensor, z_j: torch.Tensor, *, temperature: " in text["nt_xent_loss"]
    assert "float | torch.Tensor = 0.5" in text["nt_xent_loss"]
    assert "negative_keys: torch.Tensor | None = None, *, " in text["info_nce_loss"]
    assert "negative_weight: float = 1.0" in text["uel_loss"]
    assert "normalize: bool = False" in text["clip_loss"]
    assert all(t.endswith("-> torch.Tensor") for t in text.values())
    with pytest.raises(TypeError, match="nt_xent_loss"):
        clae_fast.nt_xent_loss(torch.randn(2, 2), torch.randn(2, 2), 0.5)


def test_public_docstrings_are_complete():
    """One line, Args, Returns or Raises where they apply, and an example, for every function."""
    for name in clae_fast.__all__:
        thing = getattr(clae_fast, name)
        if not callable(thing):
            continue
        doc = inspect.getdoc(thing)
        assert doc, name
        assert doc.splitlines()[0].endswith((".", ":", "`", "others.", "negatives,")), name
        if inspect.isfunction(thing) and inspect.signature(thing).parameters:
            assert "Args:" in doc, name
            assert "Raises:" in doc or "Returns:" in doc or "Example:" in doc, name


def test_validation_is_cheap():
    """At most 10 us of checks per call: the best of many, this machine is shared."""
    import timeit

    from clae_fast import functional

    z = torch.randn(8, 4)
    plan = functional.PLANS[clae_fast.nt_xent_loss]
    best = min(timeit.repeat(lambda: plan(z, z, temperature=0.5), number=200, repeat=20)) / 200
    assert best < 10e-6, f"{best * 1e6:.1f} us"
