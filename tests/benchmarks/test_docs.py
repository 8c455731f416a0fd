"""docs/performance.md names commands and columns that exist."""

import importlib
import pathlib
import re
import shlex

from benchmarks import common

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")


def test_commands_exist():
    block = re.search(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL).group(1)
    modules = []
    for line in block.splitlines():
        words = shlex.split(line, comments=True)
        if words[0] == "python":
            modules.append(importlib.import_module(words[2]))
        else:
            assert (ROOT / words[0]).is_file()
    assert len(modules) == 4
    options = set(re.findall(r"`(--[a-z-]+)", PAGE))
    known = " ".join(option for module in modules[1:] for option in vars(module.parse([])))
    assert options - {"--help"} and all(option[2:].replace("-", "_") in known for option in options - {"--help"})


def test_columns_exist():
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", PAGE, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named and named <= {*common.KEYS, *common.COLUMNS}
