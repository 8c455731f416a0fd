import pytest

from seal_jax import grade
from seal_jax.config import GradeConfig
from seal_jax.errors import SealError


def test_build(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert grade.build(GradeConfig(threshold=0.9)).threshold == 0.9
    assert grade.build(GradeConfig(name="judge"), lambda prompts: []).name == "judge"
    endpoint = grade.build(GradeConfig(name="endpoint", base_url="http://127.0.0.1:9/v1", cache=str(tmp_path)))
    assert (endpoint.name, endpoint.base_url) == ("endpoint", "http://127.0.0.1:9/v1")
    with pytest.raises(SealError, match="judge"):
        grade.build(GradeConfig(name="judge"))
    with pytest.raises(SealError, match="match, judge, endpoint"):
        grade.build(GradeConfig(name="oracle"))
