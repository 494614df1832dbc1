"""Hugging Face's Trainer with our batch order, guards and checkpoints; the loop, DeepSpeed and logging stay theirs."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from torch import distributed
from transformers import Trainer
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from llava_moslora.adapters.kernel import triton_wanted
from llava_moslora.data.loader import Batches
from llava_moslora.data.sampler import GlobalBatchSampler
from llava_moslora.distributed import rank
from llava_moslora.errors import Refusal
from llava_moslora.files.json import read_json, write_json
from llava_moslora.files.manifest import read_facts
from llava_moslora.models.names import part_of
from llava_moslora.runs.checkpoints import prune, publish_checkpoint
from llava_moslora.training.arguments import TrainingArguments
from llava_moslora.training.callbacks.adapter_stats import AdapterStats
from llava_moslora.training.callbacks.metrics import Metrics
from llava_moslora.training.callbacks.preemption import contact, ignore_signals
from llava_moslora.training.callbacks.progress import Progress
from llava_moslora.training.checkpoint import read_optimizer, read_trained, write_optimizer, write_trained
from llava_moslora.training.host_overhead import clear_trained_gradients, switch_mode_once
from llava_moslora.training.nonfinite import FiniteCheck, check_labels, out_of_memory
from llava_moslora.training.optimizer_state import (
    TrainState,
    frozen_mixers,
    random_state,
    set_random_state,
    trained_parameters,
)
from llava_moslora.training.throughput import Throughput
from llava_moslora.training.watchdog import Watchdog


class MosLoraTrainer(Trainer):
    """Trains what is trainable in ``model`` on ``train_dataset`` (:func:`llava_moslora.data.prepare.prepare`).

    Args:
        sampler: the order of the records.
        facts: what every checkpoint's manifest states besides step and seed (fingerprints).
    """

    args: TrainingArguments

    def __init__(self, *args, sampler: GlobalBatchSampler, facts: dict, **kwargs):
        super().__init__(*args, **kwargs)
        self.facts = facts
        self.sampler = sampler
        self.batches: Batches | None = None
        self.flops_per_token: int | None = None
        self.trained = trained_parameters(self.model)
        if not self.trained:
            raise Refusal("C-FLAG", "nothing to train", key="--lora_r", fix="ask for an adapter or for stage 1")
        if self.args.loss_average == "micro_batch":
            self.model_accepts_loss_kwargs = False  # no token count for the model: it averages over its micro-batch
        if self.args.device.type == "cuda" and triton_wanted() and not self.args.use_liger_kernel:
            from llava_moslora.models.fused_layers import fuse_layers  # imported here: needs Triton

            inner = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
            fuse_layers(inner.model.language_model)
        self.guard = FiniteCheck(Path(self.args.output_dir))
        self.speed = Throughput(self.model, self.args.device)
        self.extra_logs: dict[str, float] = {}  # of callbacks, for the next row of the log
        for theirs in (PrinterCallback, ProgressCallback, TensorBoardCallback):
            self.pop_callback(theirs)
        self.add_callback(Progress(self))
        self.add_callback(Metrics(Path(self.args.output_dir), tensorboard="tensorboard" in self.args.report_to))
        if self.args.health_steps:
            self.add_callback(AdapterStats(self, self.args.health_steps))

    def get_train_dataloader(self) -> Batches:
        """Our batches, not handed to accelerate: it would reshard and pad an order that is already exact."""
        self.batches = Batches(
            self.train_dataset,
            self.sampler,
            self.data_collator,
            workers=self.args.dataloader_num_workers,
            prefetch=self.args.dataloader_prefetch_factor,
            persistent=self.args.dataloader_persistent_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            seed=self.args.seed,
            worker_init=ignore_signals,
        )
        return self.batches

    def train(self, resume_from_checkpoint: str | None = None):
        try:
            with Watchdog(self.args.ddp_timeout) as self.watch, contact(self.watch.gone):
                return super().train(resume_from_checkpoint)
        finally:
            if self.batches is not None:
                self.batches.close()

    def create_optimizer(self, model=None):
        """AdamW with a learning rate per part; weight decay on matrices only, as the Trainer does."""
        if self.optimizer is not None:
            return self.optimizer
        groups: dict[tuple[float, float], list] = {}
        for name, parameter in self.trained.items():
            decay = self.args.weight_decay if parameter_rank(parameter) > 1 else 0.0
            groups.setdefault((self.learning_rate_of(name), decay), []).append(parameter)
        optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        self.optimizer = optimizer_class(
            [{"params": p, "lr": lr, "weight_decay": decay} for (lr, decay), p in groups.items()], **settings
        )
        return self.optimizer

    def learning_rate_of(self, name: str) -> float:
        args = self.args
        rate = args.learning_rate
        if part_of(name) == "vision_tower" and args.vision_lr is not None:
            rate = args.vision_lr
        if "lora_mixer" in name and args.mixer_lr is not None:
            rate = args.mixer_lr
        if part_of(name) == "projector" and args.mm_projector_lr is not None:
            rate = args.mm_projector_lr
        return rate

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step, looked at while they are still on the CPU."""
        self.watch.mark()
        batches, tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        records = [batch.pop("record").tolist() for batch in batches]
        for batch, numbers in zip(batches, records, strict=True):
            check_labels(batch["labels"], numbers)
            self.speed.count(batch)
            del batch["lengths"]  # for the counting alone
        self.guard.begin_step(records)
        return batches, tokens

    def _get_num_items_in_batch(self, batch_samples, device):
        """The trained tokens of the global batch, counted by the collator; theirs waits for the device to copy them."""
        if not (self.model_accepts_loss_kwargs and batch_samples):
            return None
        tokens = sum(len(batch["label_positions"]) for batch in batch_samples)
        if not (self.args.average_tokens_across_devices and self.args.world_size > 1):
            return tokens
        total = torch.full((), tokens, dtype=torch.int64, device=device)
        distributed.all_reduce(total)
        return total

    def _prepare_input(self, data):
        """As theirs, but without waiting for the device: batches are pinned, and a dtype is changed over there."""
        if isinstance(data, torch.Tensor):
            data = data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def floating_point_ops(self, inputs) -> int:
        """As theirs, per token of the padded batch; the model's parameters are counted once."""
        tokens = inputs["input_ids"].numel()
        if self.flops_per_token is None:
            self.flops_per_token = super().floating_point_ops(inputs) // tokens
        return self.flops_per_token * tokens

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.watch.mark()
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(self.args.per_device_train_batch_size) from error
        except Exception as error:  # DeepSpeed's fp16 optimizer raises no kind of its own
            if "loss scale already at minimum" in str(error):
                self.guard.scale_exhausted(self.state.global_step)
            raise

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's loss, kept for the guard, which looks at it when the step has been computed."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.guard.loss(result[0] if return_outputs else result)
        return result

    def _get_grad_norm(self, model, grad_norm=None) -> float | None:
        """As theirs, and a non-finite loss or gradient stops the run; without DeepSpeed before the update."""
        norm = super()._get_grad_norm(model, grad_norm)
        engine = self.model_wrapped if self.is_deepspeed_enabled else None
        return self.guard.gradient(self.state.global_step, norm, engine, self.trained)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the speed of all ranks since the last log, and what callbacks have found at this step."""
        if "loss" in logs:
            logs |= self.speed.figures() | self.extra_logs
            self.extra_logs = {}
        super().log(logs, start_time)

    def _save_checkpoint(self, model, trial) -> None:
        """Publish ``checkpoint-N``: what was trained, as float32 masters, and the Trainer's state. No pickles."""
        self.watch.mark()
        holder = self._holder()
        masters, optimizer_state = holder.masters(), holder.optimizer_state()

        def write(folder: Path) -> None:
            write_json(folder / f"random-{self.args.process_index}.json", random_state())
            if rank() == 0:
                write_trained(folder, self.model, masters)
                self.state.save_to_json(str(folder / "trainer_state.json"))
                position = {
                    "scheduler_steps": self.lr_scheduler.last_epoch,
                    "loss_scale": holder.loss_scale(),
                }
                write_optimizer(folder, self.model, optimizer_state, position)

        def facts() -> dict:
            progress = {"step": self.state.global_step, "of": self.state.max_steps}
            return {**progress, "seed": self.args.seed, "world_size": self.args.world_size, **self.facts}

        run = Path(self.args.output_dir)
        publish_checkpoint(run / f"checkpoint-{self.state.global_step}", write, facts)
        if rank() == 0 and self.args.save_total_limit:
            prune(run, self.args.save_total_limit)

    def _holder(self) -> TrainState:
        engine = self.model_wrapped if self.is_deepspeed_enabled else None
        return TrainState(self.model, getattr(self.optimizer, "optimizer", self.optimizer), engine)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """As theirs, but the state comes from our portable checkpoint instead of DeepSpeed's or torch's pickles."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        check_rotary(self.model)
        if self.is_deepspeed_enabled:
            switch_mode_once(self.model_wrapped)
            clear_trained_gradients(self.model_wrapped, self.trained)
        holder = self._holder()
        holder.begin()
        if resume_from_checkpoint is not None:
            checkpoint = Path(resume_from_checkpoint)
            holder.make_optimizer_state()
            masters = read_trained(checkpoint, self.model)
            if (redrawn := len(frozen_mixers(self.model).keys() - masters.keys())) and rank() == 0:
                print(f"{checkpoint} is of a version that kept no frozen mixers: {redrawn} drawn from the seed again")
            state, position = read_optimizer(checkpoint, holder.optimizer_state())
            holder.restore(masters, state, position["loss_scale"])
            set_schedule(self.lr_scheduler, position["scheduler_steps"])
        return prepared

    def _run_epoch(self, **theirs) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed at its end: theirs would take one step more
            self.control.should_training_stop = True
            return
        self.state.compute_steps(self.args, self.state.max_steps)  # this call's intervals, not the checkpoint's
        super()._run_epoch(**theirs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """Nothing yet: weights are put back together with the optimizer's state, in :meth:`_prepare_for_training`."""

    def _load_rng_state(self, checkpoint) -> None:
        """This rank's random streams as they were; a rank that is new (other world size) keeps its seeded ones."""
        if checkpoint is not None:
            file = Path(checkpoint) / f"random-{self.args.process_index}.json"
            if read_facts(Path(checkpoint))["world_size"] == self.args.world_size:
                set_random_state(read_json(file))


def check_rotary(model: torch.nn.Module) -> None:
    """Rotary frequencies in 16 bits turn late positions by other angles than an export does.

    Raises:
        Refusal: C-DEEPSPEED, a buffer ``inv_freq`` is not float32.
    """
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and buffer.dtype != torch.float32:
            raise Refusal(
                "C-DEEPSPEED", "rotary frequencies were rounded when DeepSpeed took the model over", key=name,
                found=buffer.dtype, expected=torch.float32,
                fix="deepspeed 0.19.8 or newer, and no data_types.buffer_dtype in its file",
            )  # fmt: skip


def set_schedule(scheduler, steps: int) -> None:
    """Put a LambdaLR (or accelerate's wrapper of one) where it is after ``steps`` steps."""
    scheduler = getattr(scheduler, "scheduler", scheduler)
    scheduler.last_epoch, scheduler._step_count = steps, steps + 1
    rates = [base * factor(steps) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def parameter_rank(parameter: torch.nn.Parameter) -> int:
    """Number of dimensions, also of a parameter that ZeRO-3 holds as an empty shard."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
