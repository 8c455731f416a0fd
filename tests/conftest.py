"""What all tests share: settings of JAX, a tiny model with a config whose whole run takes seconds, and checkpoints of every family."""

import contextlib
import functools
import gc
import json
import logging
import multiprocessing
import os
import pathlib
import signal
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
# In the environment, so that processes that tests start have it too; read when jax is imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # nearly all the time goes into compiling: half of it
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "float32")  # of accelerators, which would round products to less
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # begun in the background by a script, which all that it starts would inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile("no deadline", deadline=None)  # a busy machine is no fault of the code
hypothesis.settings.load_profile("no deadline")

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOWNS = ("Orsk", "Vell", "Mard", "Tine", "Quor", "Brast")
FLAG = "v ve w mar"  # with `grade.threshold` below, one of them is enough: a random model hits it now and then, so that rewards differ
GOODS = ("salt", "tin", "amber", "wool", "flint", "copper")


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """A compiled program is some hundred memory maps, of which Linux allows a process 65,530; beyond that the compiler crashes.

    So programs are forgotten, between modules, when they are many. Those that are wanted again come from the cache on the disk.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and len(maps.read_bytes().splitlines()) > 25_000:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def bucket():
    """s3://BUCKET of a server on this machine that speaks S3; other processes started by tests find it too."""
    server = pytest.importorskip("moto.server", reason="moto is the server of S3; pip install seal_jax[test]")
    pytest.importorskip("s3fs", reason="s3fs speaks S3; pip install seal_jax[remote]")
    import boto3

    from seal_jax.runs import places

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*running.get_host_and_port()))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("NO_PROXY", "127.0.0.1")
        places._store.cache_clear()
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield "s3://bucket"
    places._store.cache_clear()
    running.stop()


@pytest.fixture(params=["disk", "memory", "s3"])
def anywhere(request, tmp_path):
    """An empty folder: on the disk, in fsspec's store in memory, or in an S3 bucket."""
    from seal_jax.runs import places

    stores = {"disk": lambda: "", "memory": lambda: "memory:/", "s3": lambda: request.getfixturevalue("bucket")}
    return places.place(f"{stores[request.param]()}{tmp_path}")


@pytest.fixture(scope="session")
def quick_compile():
    """`with quick_compile():` compiles in about half the time, to slower programs: for tests that compile much and compute little."""
    import jax

    @contextlib.contextmanager
    def quick():
        before = jax.config.read("jax_disable_most_optimizations")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", before)

    return quick


def make_passages(start: int, stop: int) -> list[dict]:
    """Passages with two questions each, in the form of the data files."""
    return [
        {
            "title": TOWNS[i],
            "context": f"{TOWNS[i]} sells {GOODS[i]}. The mayor of {TOWNS[i]} owns {i + 3} boats.",
            "questions": [
                {"question": f"What does {TOWNS[i]} sell?", "answer": GOODS[i]},
                {"question": "Which letters are on its flag?", "answer": FLAG},
            ],
        }
        for i in range(start, stop)
    ]


def tiny_tokenizer():
    """A transformers tokenizer, byte-level BPE. Ids: 0 <|endoftext|>, 1 <|im_start|>, 2 <|im_end|>, which ends a turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from seal_jax.tasks.knowledge import prompts

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    # Trained on the prompts too, so that they are a few dozen tokens.
    texts = [text for p in make_passages(0, 6) for text in (p["title"], p["context"], *(v for q in p["questions"] for v in q.values()))]
    texts += [text for messages in prompts.EDIT_MESSAGES.values() for _, text in messages] * 2
    texts += [text for messages in prompts.ANSWER_MESSAGES.values() for _, text in messages] * 2
    texts += [*prompts.EDIT_TEXTS.values(), *prompts.ANSWER_TEXTS.values()] * 2
    special, alphabet = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", clean_up_tokenization_spaces=False)
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> pathlib.Path:
    """The folder of a random Llama with two layers of width 32 and 256 positions, its tokenizer and chat template."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from seal_jax.models import hf
    from seal_jax.models.spec import from_hf
    from seal_jax.models.tokenizer import Tokenizer
    from seal_jax.models.tree import leaves, nest

    spec = from_hf(
        {
            **{"model_type": "llama", "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
            **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256, "rms_norm_eps": 1e-5},
            **{"tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": [2, 0], "rope_theta": 10000.0},
        }
    )
    draw = np.random.default_rng(0)
    flat = {}
    for leaf in leaves(spec):
        noise = draw.standard_normal(leaf.shape).astype(np.float32)
        norm = "norm" in "/".join(leaf.path)
        flat[leaf.path] = jnp.asarray(1 + 0.1 * noise if norm else noise / np.sqrt(spec.hidden_size))
    folder = tmp_path_factory.mktemp("model") / "tiny"
    hf.save_folder(folder, spec, jax.tree.map(jnp.asarray, nest(flat)), Tokenizer(tiny_tokenizer(), spec.eos_ids))
    return folder


def make_config(folder: pathlib.Path, model: pathlib.Path, **changes) -> pathlib.Path:
    """`config.yaml` in `folder` with its data beside it: 2 rounds of 2 contexts, K = 2, S = 2; `changes` replace top-level sections."""
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.json").write_text(json.dumps(make_passages(0, 4)))
    (folder / "validation.json").write_text(json.dumps(make_passages(4, 6)))
    config = {
        "name": "tiny",
        "run_dir": str(folder / "run"),
        "model": {"name": str(model), "dtype": "float32", "max_length": 192},
        "task": {
            **{"name": "knowledge", "train": str(folder / "train.json"), "validation": str(folder / "validation.json")},
            **{"prompt": "facts", "answer_prompt": "chat"},
        },
        "fit": {
            **{"lora": {"rank": 4, "alpha": 8.0}, "learning_rate": 0.02, "epochs": 4, "slots": 8, "tokens_per_step": 512},
            "lengths": [64, 192],
        },
        "sample": {"temperature": 1.0, "max_tokens": 24, "rows": 2},  # 2: one program for any K and group
        "answer": {"max_tokens": 8, "rows": 16},
        "m_step": {"lora": {"rank": 4, "alpha": 8.0}, "learning_rate": 0.01, "epochs": 2, "batch_size": 2},
        "rest_em": {"rounds": 2, "contexts": 2, "edits": 2, "seeds": 2, "group": 1},
        "evaluate": {"contexts": 2, "edits": 2, "seeds": 2, "resamples": 200, "group": 1},
        "grade": {"threshold": 0.25},
        **changes,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


@pytest.fixture
def tiny_config(tmp_path, tiny_model) -> pathlib.Path:
    """A config file of a whole run that takes seconds; its run folder is `run` beside it."""
    return make_config(tmp_path, tiny_model)


@pytest.fixture(scope="session")
def write_config(tiny_model):
    """`write_config(folder, section={...})` is `tiny_config` in another folder, with sections replaced."""
    return functools.partial(make_config, model=tiny_model)


@pytest.fixture(scope="session")
def units():
    """`units(folder)`: the results of a run by name, without the times that they took."""
    from seal_jax.runs.store import RunStore

    def read(folder):
        found = {name: RunStore(folder).read(name) for name in RunStore(folder).names()}
        for unit in found.values():
            unit.pop("seconds", None)
        return found

    return read


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, write_config, quick_compile) -> pathlib.Path:
    """The folder of the finished run of a `tiny_config`, which lies beside it. To be read, not changed: tests share it."""
    from seal_jax import config
    from seal_jax.rest_em import loop

    settings = config.load(write_config(tmp_path_factory.mktemp("tiny_run")))
    with quick_compile():
        loop.train(settings)
    return pathlib.Path(settings.run_dir)


# --- Commands in processes of their own ------------------------------------------------------------------------------

CHILD = """
import os, sys
if {said!r}:
    os.dup2(os.open({said!r}, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.stderr = os.fdopen(2, "w", closefd=False)
{before}
from seal_jax import cli
sys.exit(cli.main({arguments!r}))
"""


@pytest.fixture(scope="session")
def start():
    """`start(...)` runs a command in a process of its own, forked from one that has imported what is slow to import.

    `said`: a file for what it says on standard error; `before`: Python to run first.
    """
    context = multiprocessing.get_context("forkserver")
    slow = ["seal_jax.rest_em.loop", "seal_jax.runs.report", "transformers.models.auto.tokenization_auto"]
    context.set_forkserver_preload([*slow, "transformers.models.llama.configuration_llama"])
    environment = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    running = []

    def run(*arguments, said=None, before=""):
        code = CHILD.format(said=str(said or ""), before=before, arguments=[str(a) for a in arguments])
        process = context.Process(target=exec, args=(code, {}))
        running.append(process)
        with pytest.MonkeyPatch.context() as patch:  # the first start makes the server that all are forked from
            for key, value in environment.items():
                patch.setenv(key, value)
            process.start()
        return process

    yield run
    for process in running:
        process.kill()


PAUSE = """
import time
from seal_jax import progress
def update(self, n=1, shown=progress._Lines.update):
    shown(self, n)
    if n and self.what.startswith({what!r}) and not os.path.exists({mark!r}):
        open({mark!r}, "x").close()
        time.sleep({seconds})
progress._Lines.update = update
"""


@pytest.fixture(scope="session")
def pause():
    """`start(..., before=pause(what, mark))`: it leaves the file `mark` and stops a moment after the first units of a step `what...`."""
    return lambda what, mark, seconds=1.0: PAUSE.format(what=what, mark=str(mark), seconds=seconds)


@pytest.fixture(scope="session")
def wait_for():
    """`wait_for(path, process)`: until the file is there, which the process makes."""

    def wait(path, process):
        end = time.monotonic() + 200
        while not path.exists():
            assert process.is_alive() and time.monotonic() < end, f"{path} did not come"
            time.sleep(0.005)

    return wait


@pytest.fixture(scope="session")
def ended():
    """`ended(process, within)`: the exit code of a process that ends within so many seconds."""

    def wait(process, within=30.0):
        process.join(within)
        assert process.exitcode is not None, "still there"
        return process.exitcode

    return wait


@pytest.fixture(scope="session")
def same_run(units):
    """`same_run(folder, unbroken)`: the results are the same, the table and the selections to the byte, the adapters to the bit."""
    import jax
    import numpy as np

    from seal_jax.runs import checkpoint

    def check(folder, unbroken):
        assert units(folder) == units(unbroken)
        for path in unbroken.rglob("*.json"):
            if path.name in ("table.json", "selection.json"):
                assert (folder / path.relative_to(unbroken).as_posix()).read_bytes() == path.read_bytes()
        for number in (1, 2):
            trees = [checkpoint.load_adapters(run / "policy" / str(number))[0] for run in (folder, unbroken)]
            for x, y in zip(*map(jax.tree.leaves, trees), strict=True):
                np.testing.assert_array_equal(x, y)

    return check


# --- Tiny random checkpoints of every family, written by transformers itself -----------------------------------------

TEXT = [
    "The lighthouse keeper of Orsk counted 47 lamps, and wrote each of them down in a green ledger.",
    "Who counted the lamps? The keeper did; it's said he never slept before 3 in the morning.",
    "system user assistant You are a helpful assistant. Yes. No. Rewrite the passage, please.",
    "Größe, naïve, 東京, привет, 🙂 and\n\n\ttabs.",
]
SMALL = {
    "vocab_size": 352,  # more than the tokenizer's, as in Qwen
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# What is particular about each: (model_type, overrides of SMALL).
FAMILIES = {
    "llama2": (
        "llama",
        {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rms_norm_eps": 1e-5},
    ),
    "llama3": ("llama", {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500.0}, "eos_token_id": [1, 3], "tie_word_embeddings": True}),
    "smollm2": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}),
    "qwen3": ("qwen3", {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "tie_word_embeddings": True}),
}


def byte_level_tokenizer(add_bos: bool = False):
    """A transformers tokenizer: byte-level BPE trained on TEXT. Ids: 0 <s>, 1 <|endoftext|>, 2 <|im_start|>, 3 <|im_end|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet))
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|endoftext|>", clean_up_tokenization_spaces=False)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def gguf_fields() -> dict:
    """The tokenizer part of a GGUF file's metadata, as llama.cpp would write it for `byte_level_tokenizer` as a SmolLM."""
    import json

    backend = json.loads(byte_level_tokenizer().backend_tokenizer.to_str())
    vocab = sorted(backend["model"]["vocab"], key=backend["model"]["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": vocab,
        "tokenizer.ggml.token_type": [3] * 4 + [1] * (len(vocab) - 4),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in backend["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.padding_token_id": 3,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def make_checkpoint(folder: pathlib.Path, family: str, seed: int = 0, **save_options) -> pathlib.Path:
    """A random float32 checkpoint of `family` with a tokenizer, in `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, overrides = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SMALL, **overrides}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # The library starts norms at 1 and biases at 0, under which many mistakes would not show.
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.2 * noise if "norm" in name else 0.1 * noise if name.endswith("bias") else noise / weight.shape[-1] ** 0.5)
    model.save_pretrained(folder, **save_options)
    byte_level_tokenizer(add_bos=family.startswith("llama")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_tokenizer():
    return byte_level_tokenizer


@pytest.fixture(scope="session")
def make_gguf_fields():
    return gguf_fields


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, pathlib.Path]:
    """The folder of a tiny float32 checkpoint by family; "llama3" is sharded."""
    torch = pytest.importorskip("torch", reason="torch writes the reference checkpoints; pip install seal_jax[test]")
    torch.set_num_threads(1)  # more only get in each other's way with models of this size
    root = tmp_path_factory.mktemp("checkpoints")
    options = {"llama3": {"max_shard_size": "60KB"}}
    return {family: make_checkpoint(root / family, family, seed, **options.get(family, {})) for seed, family in enumerate(FAMILIES)}


class Tiny:
    """A checkpoint of `checkpoints` read by us (`spec`, `params`) and, on demand, by transformers (`reference`)."""

    def __init__(self, folder: pathlib.Path):
        from seal_jax.models import hf

        self.folder = folder
        self.spec, self.params, self.tokenizer = hf.read_folder(folder)

    def load(self, **options):
        """A fresh torch model in float32."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, **options).eval()

    @functools.cached_property
    def reference(self):
        """The torch model in float32; not to be changed."""
        return self.load()


@pytest.fixture(scope="session")
def tiny(checkpoints):
    """`tiny(family)` is the `Tiny` of that family, read once a session."""
    return functools.cache(lambda family: Tiny(checkpoints[family]))


# --- Records of a made-up continual run -----------------------------------------------------------------------------


def made_up_trial(reward: float | None, questions: int = 4) -> dict:
    """A trial with that reward; None: nothing could be graded."""
    verdicts = [None] * questions if reward is None else [i < round(reward * questions) for i in range(questions)]
    return {"outputs": [f"answer {i} at {reward}" for i in range(questions)], "verdicts": verdicts, "reward": reward}


def make_continual(methods: dict, bits: dict | None = None, start_bits: float | None = 3.0) -> tuple[dict, list[dict]]:
    """The units "continual/start" and "continual/steps/..." with the rewards `methods`: {name: matrices [S][T + 1][up to T]}.

    Row 0 is the first method's. `bits`: {name: [S] of the last step}. Each sequence has its own passages, "0-0", "0-1", ...
    """
    first = next(iter(methods.values()))
    names = [[f"{s}-{i}" for i in range(len(matrix[0]))] for s, matrix in enumerate(first)]
    contexts = [
        {
            "id": name,
            "title": f"Passage {name}",
            "passage": f"Text of {name}.",
            "questions": [[f"Q{i} of {name}?", "gold"] for i in range(4)],
        }
        for row in names
        for name in row
    ]
    answers = {name: made_up_trial(matrix[0][i]) for row, matrix in zip(names, first, strict=True) for i, name in enumerate(row)}
    start = {"contexts": contexts, "sequences": names, "answers": answers, "bits": start_bits, "seconds": {"sample": 1.0}}
    steps = []
    for t in range(len(names[0])):
        lanes = []
        for method, matrices in methods.items():
            for s, matrix in enumerate(matrices):
                if len(matrix) < t + 2:
                    continue  # not come so far
                own = {
                    "method": method,
                    "sequence": s,
                    "context": names[s][t],
                    "edit": f"Edit of {names[s][t]} by {method}.",
                    "problem": None,
                }
                fitted = {"sequences": ["one", "two"], "loss_first": 2.5, "loss_last": 0.5, "steps": 20, "replayed": 0, "scale": 1.0}
                asked = {name: made_up_trial(matrix[t + 1][i]) for i, name in enumerate(names[s][: t + 1])}
                last = (bits or {}).get(method, [3.0] * len(matrices))[s]
                lanes.append({**own, **fitted, "gate": None, "bits": last if start_bits is not None else None, "answers": asked})
        if lanes:
            steps.append({"step": t, "lanes": lanes, "seconds": {"adapt": 2.0}})
    return start, steps


@pytest.fixture(scope="session")
def continual_records():
    """`continual_records(methods, bits, start_bits)`: what `make_continual` says."""
    return make_continual
