"""A disk that fills up inside a save: exit 4, no published checkpoint is lost, and with space the run resumes."""

import pytest

from llava_moslora.runs.checkpoints import newest_valid
from llava_moslora.training import trainer
from support.campaign import Campaign

pytestmark = pytest.mark.faults


def limit_file_size(*, size: int, save: int) -> None:
    """A hook: from the ``save``-th save on, no file of this process may grow beyond ``size`` bytes."""
    import resource

    save_all, saves = trainer.publish_checkpoint, []

    def publishing(*arguments) -> None:
        saves.append(1)
        if len(saves) == save:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        try:
            save_all(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    trainer.publish_checkpoint = publishing


# R4: a disk full inside a save
@pytest.mark.parametrize("world", [0, 2])
def test_disk_full(warm_server, parts, tmp_path, world):
    campaign = Campaign("disk", warm_server, parts, tmp_path, world=world, zero=2 if world else None)
    sizes = sorted(p.stat().st_size for p in (tmp_path / "uninterrupted" / "checkpoint-24").rglob("*") if p.is_file())
    for number, size in enumerate([0, 100, sizes[-1] // 4, sizes[-2] - 1, sizes[-1] // 2, sizes[-1] - 1]):
        run = f"run{number}"
        hook = ["faults.test_disk:limit_file_size", {"size": size, "save": 3}]
        full = campaign.launch(run, 0, hooks=[hook])
        assert full.status == [4] * campaign.ranks, full.printed()[-2000:]
        assert "E-DISK" in full.printed() and "what was published before is untouched" in full.printed()
        names = {p.name for p in (tmp_path / run).iterdir() if "checkpoint" in p.name}
        assert names == {"checkpoint-2", "checkpoint-4"}
        assert newest_valid(tmp_path / run)[0].name == "checkpoint-4"
        assert campaign.launch(run, 1).succeeded
        assert campaign.state_of(tmp_path / run) == campaign.final
