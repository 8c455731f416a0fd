"""The other side: transformers, PEFT and torch on the same device, with the same weights, as a careful user would run them.

torch is imported only when a peer is made, so that our side runs without it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import common
from benchmarks.common import Bench
from seal_jax import rng
from seal_jax.config import LoraConfig
from seal_jax.fit import plan
from seal_jax.fit.engine import FitJob
from seal_jax.models import lora as lora_lib
from seal_jax.models.spec import DecoderSpec, to_hf
from seal_jax.models.tree import HF_GROUP, get, leaves

PADDED = 2048  # what the original pads every sequence to


def connect(bench: Bench) -> tuple[Peer | None, str]:
    """The peer, or None and the reason."""
    if bench.args.no_peer:
        return None, "--no-peer"
    platform = jax.default_backend()
    try:
        import accelerate  # noqa: F401
        import peft  # noqa: F401
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        return None, f"{error.name} is not installed"
    if platform not in ("cpu", "gpu") or (platform == "gpu" and not torch.cuda.is_available()):
        return None, f"torch has no device like JAX's ({platform})"
    peer = None
    with common.within_memory("the peer"):
        peer = Peer(bench.spec, bench.params, "cpu" if platform == "cpu" else "cuda", str(bench.dtype))
    if peer is None:
        return None, "no room for a second model"
    # The Trainer collects garbage after each edit; it shall not have to look through what JAX has loaded, which is none of its own.
    gc.collect()
    gc.freeze()
    return peer, ""


class Peer:
    """One torch model, to which adapters are added and taken away."""

    def __init__(self, spec: DecoderSpec, params: Any, device: str, dtype: str):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        self.spec, self.device = spec, device
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps({**to_hf(spec, dtype), "eos_token_id": None, "bos_token_id": None}))
            config = transformers.AutoConfig.from_pretrained(folder)
        with torch.device(device):
            self.model = transformers.AutoModelForCausalLM.from_config(config)
        weights = dict(self.model.named_parameters())
        for leaf in leaves(spec):
            shared = torch.from_dlpack(get(params, leaf.path))
            for i, name in enumerate(leaf.names(spec)):
                own = shared[i] if leaf.stacked else shared
                weights.pop(name).data = (own.T if leaf.transposed else own).clone(memory_format=torch.contiguous_format)
        if weights:
            raise AssertionError(f"weights of the peer that ours lack: {sorted(weights)}")
        self.model.eval()
        self.model.generation_config.eos_token_id = None  # lengths are the workload's

    # --- training ---------------------------------------------------------------------------------------------------

    def fit(
        self,
        jobs: Sequence[FitJob],
        seed: int,
        *,
        padded: bool = False,
        steps: int | None = None,
        initial: bool = False,
        then: Any = None,
    ) -> list[np.ndarray]:
        """Losses by job: an adapter each, one after another, by PEFT and transformers' Trainer, in the order that ours takes.

        Batches are of the length of their longest sequence; with `padded`, all of 2048 tokens with the loss on the padding too, as in
        the original. `steps` cuts each job. `initial` starts from our initial adapters, so that losses can be compared. `then(model)`
        is called with each adapted model.
        """
        import peft

        losses = []
        for job in jobs:
            c = job.config
            adapted = peft.get_peft_model(self.model, _options(c.lora))
            if initial:
                key = jax.random.wrap_key_data(rng.words(seed, *job.key, "adapter"))
                self._copy(adapted, lora_lib.init(key, self.spec, c.lora.rank, c.lora.targets), 1.0)
            order = plan.epoch_orders(len(job.sequences), c.epochs, c.batch_size, rng.generator(seed, *job.key, "order"), c.max_steps)
            losses.append(self._train(adapted, job, [s for step in order[:steps] for s in step], PADDED if padded else None))
            if then is not None:
                then(adapted.eval())
            self.model = adapted.unload().eval()
            self.synchronize()
        return losses

    def _train(self, adapted: Any, job: FitJob, order: Sequence[int], length: int | None) -> np.ndarray:
        import torch
        import transformers

        found: list[Any] = []

        class Trainer(transformers.Trainer):
            def _get_train_sampler(self, *_: Any) -> Any:
                return torch.utils.data.SequentialSampler(data)

            def training_step(self, *args: Any, **kwargs: Any) -> Any:
                found.append(super().training_step(*args, **kwargs))
                return found[-1]

        c = job.config
        data = [_example(job, i) for i in order]
        with tempfile.TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=c.batch_size,
                num_train_epochs=1,  # `data` has all epochs in their order
                learning_rate=c.learning_rate,
                lr_scheduler_type=c.schedule,
                warmup_steps=c.warmup_steps,
                weight_decay=c.weight_decay,
                max_grad_norm=c.max_grad_norm,
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                remove_unused_columns=False,
                use_cpu=self.device == "cpu",
            )
            trainer = Trainer(model=adapted, args=arguments, train_dataset=data, data_collator=lambda rows: _collate(rows, length))
            with contextlib.redirect_stdout(None):  # it prints a summary whatever it is told
                trainer.train()
        return np.asarray([float(x) for x in found], np.float32)

    def _copy(self, adapted: Any, tree: Any, scale: float) -> None:
        """Puts the adapter `tree`, whose `b` is `scale` times PEFT's, into the adapted model."""
        import torch

        modules = dict(adapted.named_modules())
        with torch.no_grad():
            for group, members in tree["layers"].items():
                for target, leaf in members.items():
                    a, b = (torch.tensor(np.asarray(leaf[name])).to(self.device) for name in ("a", "b"))
                    for i in range(self.spec.num_layers):
                        module = modules[f"base_model.model.model.layers.{i}.{HF_GROUP[group]}.{target}"]
                        module.lora_A["default"].weight.copy_(a[i].T)
                        module.lora_B["default"].weight.copy_(b[i].T / scale)

    # --- generation -------------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int, model: Any = None, sample: bool = False) -> list[list[int]]:
        """Exactly `tokens` new tokens for every prompt, in one batch padded on the left; greedy, or as self-edits are sampled."""
        import torch

        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        how = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 0} if sample else {"do_sample": False}
        with torch.inference_mode():
            model = model or self.model
            out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=tokens, pad_token_id=0, use_cache=True, **how)
        self.synchronize()
        return out[:, width:].tolist()

    def regret(self, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> float:
        """The mean, in logits, by which this model prefers its own greedy choice to a token of `outputs`, given those before it."""
        import torch

        gaps = []
        for prompt, output in zip(prompts, outputs, strict=True):
            with torch.inference_mode():
                logits = self.model(torch.tensor([[*prompt, *output]], device=self.device)).logits[0, len(prompt) - 1 : -1].float()
            chosen = logits.gather(1, torch.tensor(output, device=self.device)[:, None])[:, 0]
            gaps.append(float((logits.max(1).values - chosen).mean()))
        return float(np.mean(gaps))

    def attach(self, lora: LoraConfig, tree: Any) -> None:
        """From here on the model has the adapter `tree`, its scale folded in."""
        import peft

        self.model = peft.get_peft_model(self.model, _options(lora)).eval()
        self._copy(self.model, tree, lora.alpha / lora.rank)

    def synchronize(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()


def _options(lora: LoraConfig) -> Any:
    import peft

    return peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), task_type="CAUSAL_LM")


def _example(job: FitJob, index: int) -> dict[str, list[int]]:
    sequence = job.sequences[index]
    before = max(sequence.loss_from, 1)
    return {"input_ids": list(sequence.ids), "labels": [-100] * before + list(sequence.ids[before:])}


def _collate(rows: Sequence[dict[str, list[int]]], length: int | None) -> dict[str, Any]:
    import torch

    size = length or max(len(row["input_ids"]) for row in rows)
    fill = -100 if length is None else 0  # the original takes the loss on its padding
    pad = lambda key, value: torch.tensor([row[key] + [value] * (size - len(row[key])) for row in rows])  # noqa: E731
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (size - len(row["input_ids"])) for row in rows])
    return {"input_ids": pad("input_ids", 0), "attention_mask": mask, "labels": pad("labels", fill)}


class Vllm:
    """vLLM with the same shape and weights of its own making: it is timed, its tokens are not compared."""

    def __init__(self, bench: Bench):
        import vllm

        self.folder = tempfile.TemporaryDirectory()
        Path(self.folder.name, "config.json").write_text(json.dumps(to_hf(bench.spec, str(bench.dtype))))
        self.model = vllm.LLM(
            self.folder.name, load_format="dummy", skip_tokenizer_init=True, gpu_memory_utilization=0.35, max_model_len=1024
        )

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        import vllm

        how = vllm.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        done = self.model.generate([{"prompt_token_ids": list(p)} for p in prompts], how, use_tqdm=False)
        return [list(x.outputs[0].token_ids) for x in done]


def vllm_reason(bench: Bench) -> str | None:
    """Why vLLM is not measured; None if it is."""
    if bench.args.no_peer or bench.on_cpu:
        return "--no-peer" if bench.args.no_peer else "a CPU"
    try:
        import vllm  # noqa: F401
    except ImportError:
        return "not installed"
    return None


def release() -> None:
    """Gives torch's freed memory back to the device, before our side needs it."""
    gc.collect()
    with contextlib.suppress(ImportError):
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
