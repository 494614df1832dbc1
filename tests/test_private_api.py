"""A library whose inside has changed is refused with its version, before anything silently stops working."""

import configparser
import re
import subprocess
import sys

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from transformers import Trainer

from llava_moslora.errors import Refusal
from llava_moslora.private_api import PARTS, SUPPORTED, TESTED, check_private_api
from support.launching import ROOT

TRAINER = "training.trainer"


@pytest.mark.parametrize("user", PARTS)
def test_the_installed_versions_are_as_listed(user):
    check_private_api(user)


@pytest.mark.parametrize("user", PARTS)
def test_every_part_that_disappears_is_noticed(user, monkeypatch):
    """Each one on its own: the others, of the same owner, must not hide it."""
    parts = PARTS[user]
    for part in parts:
        monkeypatch.setitem(PARTS, user, (part._replace(name=f"{part.name}_of_before"),))
        with pytest.raises(Refusal, match=rf"E-VERSION\].*{part.name}_of_before: .*has changed; found no such"):
            check_private_api(user)


def test_a_renamed_method_is_refused(monkeypatch):
    monkeypatch.setattr(Trainer, "_grad_norm", Trainer._get_grad_norm, raising=False)
    monkeypatch.delattr(Trainer, "_get_grad_norm")
    with pytest.raises(Refusal) as refusal:
        check_private_api(TRAINER)
    line = refusal.value.line()
    assert refusal.value.exit_status == 4
    assert "transformers.trainer.Trainer._get_grad_norm: llava_moslora.training.trainer relies on" in line
    assert re.search(r"found no such method in transformers \d+\.\d+", line)
    assert f"expected _get_grad_norm(model, grad_norm), as in transformers {SUPPORTED['transformers']}; fix: " in line
    assert line.endswith(f"pip install transformers=={TESTED['transformers']}, the version this was tested with")


@pytest.mark.parametrize(
    "changed",
    [
        lambda self, model: None,  # without grad_norm
        lambda self, grad_norm, model: None,  # in another order
        lambda self, model, gradient_norm=None: None,  # renamed
        lambda self, model, norm_type, grad_norm=None: None,  # one more that a caller must give
    ],
)
def test_other_parameters_are_refused(monkeypatch, changed):
    monkeypatch.setattr(Trainer, "_get_grad_norm", changed)
    with pytest.raises(Refusal, match=r"E-VERSION.*found _get_grad_norm\(self, .*expected _get_grad_norm\(model, grad"):
        check_private_api(TRAINER)


def test_one_more_parameter_with_a_default_is_no_change(monkeypatch):
    monkeypatch.setattr(Trainer, "_get_grad_norm", lambda self, model, grad_norm=None, norm_type=2: None)
    check_private_api(TRAINER)


def test_a_wrapper_is_no_change(monkeypatch):
    """Such as a profiler puts around a method."""
    monkeypatch.setattr(Trainer, "_get_grad_norm", lambda self, *args, **kwargs: None)
    check_private_api(TRAINER)


def test_a_method_that_nothing_calls_any_more_is_refused(monkeypatch):
    """It exists as before, so an override of it would be accepted, and never run."""

    def _run_epoch(self, model, epoch, train_dataloader, **others):
        return self.get_batch_samples, self.training_step, self.floating_point_ops, self._clip_grad_norm

    monkeypatch.setattr(Trainer, "_run_epoch", _run_epoch)
    with pytest.raises(Refusal, match=r"Trainer\._get_grad_norm: .*found transformers.trainer.Trainer does not call"):
        check_private_api(TRAINER)


def test_a_method_of_peft_that_nothing_calls_any_more_is_refused(monkeypatch):
    def update_layer(self, adapter_name, r, lora_alpha, config):
        self.lora_variant[adapter_name].init(self, adapter_name=adapter_name)

    monkeypatch.setattr(LoraLayer, "update_layer", update_layer)
    with pytest.raises(Refusal, match=r"resolve_lora_variant: .*found peft.*LoraLayer does not call it in peft \d"):
        check_private_api("adapters.layers")
    monkeypatch.undo()
    monkeypatch.setattr(LoraVariant, "init", staticmethod(lambda layer, name: None))
    with pytest.raises(Refusal, match=r"LoraVariant\.init: .*found init\(layer, name\)"):
        check_private_api("adapters.layers")


def test_accelerate_is_named_where_it_is_accelerate_that_changed(monkeypatch):
    from accelerate.utils.deepspeed import DeepSpeedEngineWrapper

    monkeypatch.setattr(DeepSpeedEngineWrapper, "backward", lambda self, loss: None)
    with pytest.raises(Refusal, match=r"part of accelerate .*DeepSpeedEngineWrapper does not call it in accelerate"):
        check_private_api("deepspeed")


@pytest.mark.parametrize("user", PARTS.keys() - {"deepspeed"})
def test_a_module_checks_when_it_is_imported(user):
    file = ROOT / "llava_moslora" / f"{user.replace('.', '/')}.py"
    assert f'\ncheck_private_api("{user}")\n' in file.read_text(encoding="utf-8")  # not indented: outside of functions


def test_an_import_with_a_changed_library_fails():
    change = (
        "from transformers import Trainer; Trainer.gradient_norm = Trainer._get_grad_norm; del Trainer._get_grad_norm"
    )
    start = "from llava_moslora.errors import run_script; run_script(lambda: None)"  # as a script does
    code = f"{change}; {start}; import llava_moslora.training.trainer"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 4, "that of a wrong environment, as from inside a script's main"
    assert "error[E-VERSION] transformers.trainer.Trainer._get_grad_norm: " in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_deepspeed_is_checked_when_a_run_has_an_engine(monkeypatch):
    """Before the engine's methods are replaced."""
    from llava_moslora.training import trainer as module

    def refuse(user):
        raise Refusal("E-VERSION", user)

    trainer = object.__new__(module.MosLoraTrainer)
    trainer.model = trainer.model_wrapped = torch.nn.Linear(1, 1)
    trainer.is_deepspeed_enabled = True
    monkeypatch.setattr(Trainer, "_prepare_for_training", lambda *_: (None, None))
    monkeypatch.setattr(module, "check_private_api", refuse)
    with pytest.raises(Refusal, match="deepspeed"):
        trainer._prepare_for_training(1, None, None)


def test_the_versions_are_those_that_are_declared():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    required = setup["options"]["install_requires"].split()
    assert {f"{library}{versions}" for library, versions in SUPPORTED.items()} <= set(required)
    tested = (ROOT / ".ci" / "constraints.txt").read_text().split()
    assert {f"{library}=={version}" for library, version in TESTED.items()} <= set(tested)
