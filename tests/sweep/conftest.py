import pytest
import yaml


@pytest.fixture
def write_sweep(tmp_path, tiny_config):
    """`write_sweep(space=..., ...)`: a sweep file over the tiny config beside it, small enough to be measured in seconds."""

    def write(**said):
        small = {"rest_em.rounds": 1, "evaluate.contexts": 1, "evaluate.edits": 1, "evaluate.seeds": 1}
        path = tmp_path / "sweep.yaml"
        data = {"name": "tiny", "base": tiny_config.name, "set": small, "run_dir": str(tmp_path / "sweep"), **said}
        path.write_text(yaml.safe_dump(data, sort_keys=False))
        return path

    return write


@pytest.fixture(scope="module")
def one_ray():
    """Ray on two cores of this machine and its loopback interface, for all tests of a module; programs compile as in `quick_compile`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        patch.delenv("RAY_ADDRESS", raising=False)
        trials = pytest.importorskip("seal_jax.sweep.trials", reason="trials need Ray; pip install seal_jax[ray]")
        import ray

        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield trials
        ray.shutdown()
