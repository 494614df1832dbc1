"""Hugging Face's Trainer with this package's data order, checks and checkpoints.

Many overridden methods are not public API: :mod:`llava_moslora.private_api` lists them and checks, at import, that this
version of transformers still has and calls them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from peft.optimizers import create_riemannian_optimizer
from torch import Tensor, distributed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from llava_moslora.adapters.adalora import OrthogonalityTerm, is_adalora
from llava_moslora.adapters.dropout import triton_enabled
from llava_moslora.data.loader import TrainDataLoader
from llava_moslora.data.sampler import GlobalBatchSampler
from llava_moslora.distributed import rank
from llava_moslora.errors import Refusal
from llava_moslora.files.disk import read_json, write_json
from llava_moslora.files.manifest import read_facts
from llava_moslora.models.names import part_of
from llava_moslora.private_api import check_private_api
from llava_moslora.runs.checkpoints import checkpoint_of, prune, publish_checkpoint
from llava_moslora.training.arguments import TrainingArguments
from llava_moslora.training.callbacks.adapter_stats import AdapterStats
from llava_moslora.training.callbacks.curves import Curves
from llava_moslora.training.callbacks.early_stopping import EarlyStopping
from llava_moslora.training.callbacks.metrics import MetricsWriter, ProgressBar
from llava_moslora.training.callbacks.preemption import catch_lost_ranks, ignore_signals
from llava_moslora.training.callbacks.trackers import start_trackers
from llava_moslora.training.checkpoint import (
    read_optimizer,
    read_trained,
    set_scheduler_step,
    write_optimizer,
    write_trained,
)
from llava_moslora.training.deepspeed_config import check_rotary_frequencies
from llava_moslora.training.evaluating_trainer import EvaluateFirst, EvaluatingTrainer
from llava_moslora.training.host_overhead import clear_trained_gradients, step_without_waiting, switch_mode_once
from llava_moslora.training.nonfinite import FiniteCheck, check_labels, out_of_memory
from llava_moslora.training.optimizer_state import TrainState, frozen_factors, trained_parameters
from llava_moslora.training.random_state import random_state, set_random_state
from llava_moslora.training.throughput import Throughput
from llava_moslora.training.validation import validation_facts
from llava_moslora.training.watchdog import Watchdog

check_private_api("training.trainer")


class MosLoraTrainer(EvaluatingTrainer):
    """Trains what is trainable in ``model`` on ``train_dataset`` (:func:`llava_moslora.data.prepare.prepare`).

    Args:
        sampler: the order of the records.
        facts: fingerprints of the inputs, for the manifest of every checkpoint.
        kwargs: the Trainer's; ``eval_dataset`` is :class:`~llava_moslora.data.split.ValidationData` or None.
    """

    args: TrainingArguments
    optimizer: torch.optim.Optimizer | None

    def __init__(self, *args, sampler: GlobalBatchSampler, facts: dict, **kwargs):
        super().__init__(*args, **kwargs)
        self.facts = facts
        self.sampler = sampler
        self.data_loader: TrainDataLoader | None = None
        self.flops_per_token: int | None = None
        self.trained = trained_parameters(self.model)
        if not self.trained:
            raise Refusal("C-FLAG", "nothing to train", key="--lora_r", fix="train an adapter, or stage 1")
        if self.args.loss_average == "micro_batch":
            self.model_accepts_loss_kwargs = False  # without a token count the model averages over its micro-batch
        # A loss over the global batch's tokens is added up over micro-batches and ranks, another one averaged
        summed = self.model_accepts_loss_kwargs and self.args.average_tokens_across_devices
        parts = (self.args.gradient_accumulation_steps or 1) if self.model_accepts_loss_kwargs else 1
        share = 1 / (parts * (self.args.world_size if summed else 1))
        self.orthogonality = OrthogonalityTerm(self.model, share) if is_adalora(self.model) else None
        self.throughput = self.prepare_model()
        self.finite_check = FiniteCheck(self.args.run_folder)
        self.runs_ahead = False  # the host does not wait for the device at every step
        self.extra_logs: dict[str, float] = {}  # added by callbacks to the next row of the log
        for callback in (PrinterCallback, ProgressCallback, TensorBoardCallback):
            self.pop_callback(callback)
        self.add_callback(AfterEachStep(self))
        self.add_callback(ProgressBar())
        self.add_callback(MetricsWriter(self.args.run_folder, tensorboard="tensorboard" in self.args.reporters))
        if self.args.health_steps:
            self.add_callback(AdapterStats(self, self.args.health_steps))
        if self.args.early_stopping_patience:
            self.add_callback(EarlyStopping(self.args.early_stopping_patience, self.args.early_stopping_threshold))
        self.add_callback(Curves(self.args.run_folder))
        self.add_callback(EvaluateFirst(self))  # the last: its evaluations are shown by the others

    def prepare_model(self) -> Throughput:
        """Specific to an LLM with or without a vision tower: fused layers, and FLOPs by tokens."""
        if self.args.device.type == "cuda" and triton_enabled() and not self.args.use_liger_kernel:
            from llava_moslora.models.fused_layers import fuse_model  # imported here: needs Triton

            fuse_model(self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model)
        return Throughput(self.model, self.args.device)

    def get_train_dataloader(self) -> TrainDataLoader:
        """Not prepared by accelerate, which would shard and pad the records again."""
        self.data_loader = TrainDataLoader(
            self.train_dataset,
            self.sampler,
            self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            persistent_workers=self.args.dataloader_persistent_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            seed=self.args.seed,
            worker_init_fn=ignore_signals,
        )
        return self.data_loader

    def train(self, resume_from_checkpoint: str | None = None):
        start_trackers(self, self.args.run_folder)
        try:
            with Watchdog(self.args.ddp_timeout) as self.watchdog, catch_lost_ranks(self.watchdog.dead_on_this_host):
                return super().train(resume_from_checkpoint)
        finally:
            if self.data_loader is not None:
                self.data_loader.close()

    def create_optimizer(self, model=None):
        """``--optim`` with a learning rate per part; weight decay on matrices only, as the Trainer does."""
        if self.optimizer is not None:
            return self.optimizer
        groups: dict[tuple[float, float], list] = {}
        for name, parameter in self.trained.items():
            decay = self.args.weight_decay if dimensions(parameter) > 1 else 0.0
            groups.setdefault((self.learning_rate_of(name), decay), []).append(parameter)
        optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        made = [{"params": p, "lr": lr, "weight_decay": decay} for (lr, decay), p in groups.items()]
        if self.args.riemannian:
            self.optimizer = create_riemannian_optimizer(self.model, optimizer_class, **settings)
            self.optimizer.param_groups.clear()
            for group in made:
                self.optimizer.add_param_group(group)
        else:
            self.optimizer = optimizer_class(made, **settings)
        return self.optimizer

    def learning_rate_of(self, name: str) -> float:
        args = self.args
        rate = args.learning_rate
        if part_of(name) == "vision_tower" and args.vision_lr is not None:
            rate = args.vision_lr
        if "lora_mixer" in name and args.mixer_lr is not None:
            rate = args.mixer_lr
        if ".lora_B." in name:
            rate *= args.lora_plus_ratio
        if part_of(name) == "projector" and args.mm_projector_lr is not None:
            rate = args.mm_projector_lr
        return rate

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As the Trainer's: the micro-batches of one optimizer step, here checked and counted, still on the CPU."""
        self.watchdog.report_progress()
        batches, tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        records = [batch.pop("record").tolist() for batch in batches]
        for batch, numbers in zip(batches, records, strict=True):
            self.count(batch, numbers)
        self.finite_check.begin_step(records)
        return batches, tokens

    def count(self, batch: dict, records: list[int]) -> None:
        """Check a micro-batch that is about to be trained, and count it for the throughput."""
        labels = len(batch["label_positions"])
        check_labels(labels, records)
        self.throughput.add(batch.pop("lengths").tolist(), labels, images=len(batch.get("pixel_values", ())))

    def _get_num_items_in_batch(self, batch_samples, device):
        """Trained tokens of the global batch, counted on the CPU; the Trainer's own count would wait for the device."""
        if not (self.model_accepts_loss_kwargs and batch_samples):
            return None
        tokens = sum(len(batch["label_positions"]) for batch in batch_samples)
        if not (self.args.average_tokens_across_devices and self.args.world_size > 1):
            return tokens
        total = torch.full((), tokens, dtype=torch.int64, device=device)
        distributed.all_reduce(total)
        return total

    def _prepare_input(self, data):
        """As the Trainer's, without waiting for the device: batches are pinned, dtypes are converted on the device."""
        if isinstance(data, torch.Tensor):
            data = data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def floating_point_ops(self, inputs) -> int:
        """As the Trainer's, but the model's parameters are counted only once per run."""
        tokens = inputs["input_ids"].numel()
        if self.flops_per_token is None:
            self.flops_per_token = super().floating_point_ops(inputs) // tokens
        return self.flops_per_token * tokens

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.watchdog.report_progress()
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(self.args.per_device_train_batch_size) from error
        except Exception as error:  # DeepSpeed's fp16 optimizer raises a plain Exception
            if "loss scale already at minimum" in str(error):
                self.finite_check.loss_scale_exhausted(self.state.global_step)
            raise

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As the Trainer's; :meth:`_get_grad_norm` checks the loss when the whole step has been computed."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.finite_check.add_loss(result[0] if return_outputs else result)
        return result

    def _clip_grad_norm(self, model):
        """As the Trainer's: under DeepSpeed the norm, which the engine has clipped by."""
        return self.engine.get_global_grad_norm() if self.runs_ahead else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None) -> Tensor | float | None:
        """As the Trainer's; NaN or Inf in a loss or the gradient stops the run, without DeepSpeed before the update."""
        if self.runs_ahead:
            norm = self.finite_check.check_later(self.state.global_step, self.engine.get_global_grad_norm())
            if self.weights_are_used_after(self.state.global_step + 1):
                self.finite_check.settle()
            return norm
        norm = super()._get_grad_norm(model, grad_norm)
        return self.finite_check.check(self.state.global_step, norm, self.engine, self.trained)

    def weights_are_used_after(self, step: int) -> bool:
        """Whether a callback uses the model after this step, so that its weights must have been checked for NaN."""
        often = (self.args.health_steps, getattr(self.args, "sample_steps", 0))
        return step == self.state.max_steps or any(steps and step % steps == 0 for steps in often)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the throughput since the last log, and the callbacks' metrics."""
        self.finite_check.settle()
        if "loss" in logs:
            if self.orthogonality is not None:
                term = self.orthogonality.take()
                logs |= {"cross_entropy": logs["loss"] - term, "orthogonality": term}
            logs |= self.throughput.rates() | self.extra_logs
            self.extra_logs = {}
        super().log(logs, start_time)

    def _save_checkpoint(self, model, trial) -> None:
        """Publish ``checkpoint-N``: the float32 masters of what is trained, the optimizer's and the Trainer's state."""
        self.watchdog.report_progress()
        self.finite_check.settle()
        self._compare_with_best()
        train_state = self._train_state()
        writes = rank() == 0  # the other ranks' part ends with gathering: a copy each would fill the host's memory
        masters, optimizer_state = train_state.masters(writes), train_state.optimizer_state(writes)

        def write(folder: Path) -> None:
            write_json(folder / f"random-{self.args.process_index}.json", random_state())
            if writes:
                write_trained(folder, self.model, masters)
                self.state.save_to_json(str(folder / "trainer_state.json"))
                position = {"scheduler_steps": self.lr_scheduler.last_epoch, "loss_scale": train_state.loss_scale()}
                write_optimizer(folder, self.model, optimizer_state, position)

        def facts() -> dict:
            progress = {"step": self.state.global_step, "of": self.state.max_steps}
            where = {"seed": self.args.seed, "world_size": self.args.world_size}
            return progress | where | self.facts | validation_facts(self.args, self.state)

        publish_checkpoint(checkpoint_of(self.args.run_folder, self.state.global_step), write, facts)
        self.saved_step = self.state.global_step
        if rank() == 0 and self.args.save_total_limit:
            prune(self.args.run_folder, self.args.save_total_limit, best=self.state.best_global_step)

    @property
    def engine(self):
        """The DeepSpeed engine, or None."""
        return self.model_wrapped if self.is_deepspeed_enabled else None

    def _train_state(self) -> TrainState:
        return TrainState(self.model, getattr(self.optimizer, "optimizer", self.optimizer), self.engine)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """As the Trainer's, but a checkpoint is read from this package's files, not from pickles."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        check_rotary_frequencies(self.model)
        if self.engine is not None:
            check_private_api("deepspeed")
            switch_mode_once(self.engine)
            clear_trained_gradients(self.engine, self.trained)
            self.runs_ahead = step_without_waiting(self.engine)
        train_state = self._train_state()
        train_state.undo_initial_step()
        if resume_from_checkpoint is not None:
            checkpoint, self.saved_step = Path(resume_from_checkpoint), self.state.global_step
            train_state.create_optimizer_state()
            masters = read_trained(checkpoint, self.model)
            if (redrawn := len(frozen_factors(self.model).keys() - masters.keys())) and rank() == 0:
                print(f"{checkpoint} is of a version that saved no frozen mixers: {redrawn} drawn from the seed again")
            state, position = read_optimizer(checkpoint, train_state.optimizer_state())
            train_state.restore(masters, state, position["loss_scale"])
            set_scheduler_step(self.lr_scheduler, position["scheduler_steps"])
        return prepared

    def _run_epoch(self, **kwargs) -> None:
        """As the Trainer's; a resumed run starts in the middle of its epoch without reading the records before."""
        if self.state.global_step >= self.state.max_steps:  # a finished run: the Trainer would take one more step
            self.control.should_training_stop = True
        if self.control.should_training_stop:  # or the evaluation before the first step ended the run
            return
        epoch, batch = divmod(self.state.global_step, self.sampler.global_batches)
        self.sampler.set_epoch(epoch)
        self.sampler.start_at(batch)
        self.state.compute_steps(self.args, self.state.max_steps)  # this call's intervals, not the checkpoint's
        super()._run_epoch(**kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """Does nothing: :meth:`_prepare_for_training` has restored the weights."""

    def _load_rng_state(self, checkpoint) -> None:
        """This rank's random states from the checkpoint; under another world size they stay as seeded."""
        if checkpoint is not None:
            file = Path(checkpoint) / f"random-{self.args.process_index}.json"
            if read_facts(Path(checkpoint))["world_size"] == self.args.world_size:
                set_random_state(read_json(file))


class AfterEachStep(TrainerCallback):
    """Before a step is logged or saved: asserts that it was checked, and sets the epoch by the data order."""

    def __init__(self, trainer: MosLoraTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **_):
        self.trainer.finite_check.require_checked()
        state.epoch = state.global_step / self.trainer.sampler.global_batches


def dimensions(parameter: torch.nn.Parameter) -> int:
    """Number of dimensions, also of a parameter that ZeRO-3 holds as an empty shard."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
