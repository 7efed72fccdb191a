"""Runs the Triton cases in a process of their own, and compiles the kernels for CUDA without a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

CASES = Path(__file__).with_name("interpreted_bipartite.py")


def run(arguments: list[str], repo_root: Path, **variables: str) -> str:
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=repo_root,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=500,
    )
    output = process.stdout + process.stderr
    assert process.returncode == 0, output[-6000:]
    return output


def test_cases(request: pytest.FixtureRequest, repo_root: Path) -> None:
    """On a GPU where there is one, else in interpreter mode, which must be set before Triton is imported."""
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    golden = request.config.getoption("--golden")
    if golden is not None:
        arguments.append(f"--golden={Path(golden).resolve()}")
    variables = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    output = run(arguments, repo_root, **variables)
    assert " passed" in output and " failed" not in output, output[-2000:]


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from vlmprune.kernels.bipartite import triton_kernels as kernels
from vlmprune.kernels.bipartite import triton_pairs as pairs

target = GPUTarget("cuda", 90, 32)
strides = {"stride_b": "i64", "stride_n": "i32", "stride_d": "i32"}
match = {"a_index": "*i64", "b_index": "*i64", "a_free": "*u8", "b_free": "*u8", "scores": "*fp32", "partners": "*i64",
    "n_a": "i32", "n_b": "i32", "d": "i32", "first_a": "i32", "first_b": "i32", **strides}
merge = {"weight": "*fp32", "members": "*i64", "starts": "*i64", "n": "i32", "n_groups": "i32", "d": "i32", **strides}
select = {"scores": "*fp32", "partners": "*i64", "kept": "*i64", "sources": "*i64", "into": "*i64", "group": "*i64",
    "merged": "*u8", "n": "i32", "n_a": "i32", "n_b": "i32", "width": "i32", "protect": "i32"}
pair = {"size": "*fp32", "kept": "*i64", "sources": "*i64", "into": "*i64", "totals": "*fp32", "n": "i32",
    "n_out": "i32", "r": "i32", "d": "i32", **strides}
tile = {"BLOCK_A": 64, "BLOCK_B": 64}
jobs = [
    (kernels.match_kernel, {"metric": "*fp32", **match}, {**tile, "BLOCK_D": 32, "PLAIN": True}),
    (kernels.match_kernel, {"metric": "*bf16", **match}, {**tile, "BLOCK_D": 64, "PLAIN": True}),
    (kernels.match_kernel, {"metric": "*fp16", **match}, {**tile, "BLOCK_D": 64, "PLAIN": False}),
    (kernels.rank_kernel, {"keys": "*i64", "ranks": "*i64", "n": "i32"}, {"BLOCK": 64}),
    (kernels.merge_kernel, {"x": "*bf16", "out": "*bf16", **merge}, {"MODE": 1, "HAS_WEIGHT": True, "BLOCK_D": 128}),
    (kernels.merge_kernel, {"x": "*fp32", "out": "*fp32", **merge}, {"MODE": 2, "HAS_WEIGHT": False, "BLOCK_D": 64}),
    (kernels.merge_kernel, {"x": "*fp16", "out": "*fp16", **merge}, {"MODE": 1, "HAS_WEIGHT": False, "BLOCK_D": 1}),
    (pairs.select_kernel, select, {"BY_RANK": False, "BLOCK": 512, "CHUNK": 16}),
    (pairs.select_kernel, select, {"BY_RANK": True, "BLOCK": 2048, "CHUNK": 4}),
    (pairs.pair_kernel, {"x": "*bf16", "out": "*bf16", **pair}, {"HAS_SIZE": True, "BLOCK_R": 16, "BLOCK_D": 1024}),
    (pairs.pair_kernel, {"x": "*fp32", "out": "*fp32", **pair}, {"HAS_SIZE": False, "BLOCK_R": 1, "BLOCK_D": 1}),
]
for kernel, types, constants in jobs:
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    built = compile(ASTSource(kernel, signature, places), target=target, options={"enable_fp_fusion": True})
    assert ".tf32" not in built.asm["ptx"], "float32 inputs must not be rounded to TF32"
    print("built", kernel.__name__)
"""


def test_kernels_compile_for_cuda(repo_root: Path, tmp_path: Path) -> None:
    """The interpreter accepts programs that the compiler refuses, so build them for a GPU target too."""
    if importlib.util.find_spec("triton.backends.nvidia") is None:
        pytest.skip("this Triton has no CUDA compiler")
    script = tmp_path / "build.py"
    script.write_text(COMPILE)
    path = os.pathsep.join([str(repo_root), os.environ.get("PYTHONPATH", "")])
    variables = {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    output = run([str(script)], repo_root, **variables)
    assert output.count("built ") == 11
