"""Every text of the ARC task: puzzles and self-edit prompts as chat messages, and grids read back from what a model wrote.

All are messages, which the model's own chat template renders. The wording is the original's.
"""

from __future__ import annotations

from seal_jax.tasks.arc.augmenters import Augmenter
from seal_jax.tasks.arc.grids import Grid, Puzzle
from seal_jax.tasks.base import Prompt

PUZZLE = (
    "Figure out the underlying transformation in the following examples and apply it to the test case. {description}Here are some "
    "examples from this transformation, your answer must follow the format.\n"
)
ARRAYS = "The input-output grids are provided as python arrays:\n"

SYSTEM = "You are a helpful assistant that provide the correct output for the given task immediately."
SELF_EDIT = """
You are configuring a model training pipeline by selecting from predefined tools.

You must make two decisions:

1. **Data Generation Tools** — For each of the following, choose true or false:
    - use_basic_augmentations
    - use_size_augmentations
    - use_chain_augmentations
    - use_repeat_augmentations

2. **Training Configuration** — Choose one of:
    - "train_using_all_tokens"
    - "train_using_output_tokens"

Also specify:
    - learning_rate (float)
    - num_train_epochs (integer)

### Output Format

Respond with a valid JSON object. Do not include any explanation, markdown, or extra text. Use lowercase `true`/`false` for booleans and \
ensure correct JSON syntax.

Example output:

{
  "data_generation": {
    "use_basic_augmentations": ...,
    "use_size_augmentations": ...,
    "use_chain_augmentations": ...,
    "use_repeat_augmentations": ...
  },
  "training": {
    "strategy": ...,
    "learning_rate": ...,
    "num_train_epochs": ...
  }
}
"""

INT64 = range(-(2**63), 2**63)


def puzzle_prompt(puzzle: Puzzle) -> Prompt:
    """What the adapted model reads: the training pairs, then the test pair's input, whose output is to be written."""
    shown = "".join(f"{grid_text(pair.input)} -> {answer_text(pair.output)}\n" for pair in puzzle.train)
    return _prompt(PUZZLE.format(description="") + ARRAYS + shown, f"{grid_text(puzzle.test.input)} -> ")


def answer_text(grid: Grid) -> str:
    """The answer to a puzzle as the model writes it, the assistant's turn."""
    return f"{grid_text(grid)}#"


def grid_text(grid: Grid) -> str:
    """A grid as numpy prints a small array: rows in brackets, cells between spaces."""
    return "[" + "\n ".join(f"[{' '.join(map(str, row))}]" for row in grid) + "]"


def edit_prompt(puzzle: Puzzle) -> Prompt:
    """What the policy reads to write a self-edit: the training pairs, and what it may choose."""
    shown = "".join(f"Input:\n{_lines(pair.input)}\nOutput:\n{_lines(pair.output)}\n" for pair in puzzle.train)
    return _prompt(SYSTEM, f"{shown}------\n\n{SELF_EDIT}")


def decode(text: str, inverter: Augmenter | None = None) -> Grid | None:
    """The grid that a model wrote, turned back by `inverter`; None where it cannot be read. Any text may come.

    What is read is as lenient as in the original. Marks (`#`, brackets) may stand anywhere; of a text with a code fence, what is in the
    first counts. As many numbers as there are go row by row into as many rows as there are lines, if they fit. No numbers are a grid
    without cells. Numbers wrap around to 8 bits, and those beyond 64 are not read.
    """
    text = text.replace("#", "").replace("  ", " ")
    if "```" in text:
        text = text.split("```")[1]
    text = text.strip()
    try:
        cells = [int(word) for word in text.replace("[", "").replace("]", "").split()]
    except ValueError:
        return None
    height = text.count("\n") + 1
    width, rest = divmod(len(cells), height)
    if rest or not all(cell in INT64 for cell in cells):
        return None
    cells = [(cell + 128) % 256 - 128 for cell in cells]
    grid = tuple(tuple(cells[i * width : (i + 1) * width]) for i in range(height))
    return grid if inverter is None else inverter.grid(grid)


def _prompt(system: str, user: str) -> Prompt:
    return Prompt(messages=({"role": "system", "content": system}, {"role": "user", "content": user}))


def _lines(grid: Grid) -> str:
    return "".join(" ".join(map(str, row)) + "\n" for row in grid)
