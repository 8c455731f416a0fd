import os
import pathlib
import subprocess
import sys

import pytest

PROGRAM = """
import jax, jax.numpy as jnp
from seal_jax.parallel import compiler
compiler.keep()
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8)))
"""


@pytest.mark.parametrize(("told", "kept"), [(None, "user"), ("elsewhere", "elsewhere"), ("", None)])
def test_programs_are_kept_for_the_next_run(tmp_path, told, kept):
    """In the user's cache folder, unless JAX has been told another, or none."""
    env = {**os.environ, "SEAL_CACHE": str(tmp_path / "user")}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    env.pop("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", None)  # small ones too, by `keep` alone
    if told is not None:
        env["JAX_COMPILATION_CACHE_DIR"] = told and str(tmp_path / told)
    subprocess.run([sys.executable, "-c", PROGRAM], env=env, check=True, cwd=pathlib.Path(__file__).parents[2])
    found = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path.is_file()}
    assert found == ({kept} if kept else set())
