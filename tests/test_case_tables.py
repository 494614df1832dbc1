"""The tables of wrong configurations, damaged checkpoints and runtime events are complete: every case names its tests.

Those of data and images are in data/test_case_list.py.
"""

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CASES = {
    "C1 an unknown key": "training/test_arguments.py test_wrong_flags_are_answered test_unknown_key_in_a_file",
    "C2 a rank that cannot be": "training/test_validate.py test_values_out_of_range"
    " models/test_assemble.py test_a_rank_above_a_linears_smaller_side_is_refused",
    "C3 alpha 0 or NaN": "training/test_validate.py test_values_out_of_range",
    "C4 a target that matches nothing": "models/test_assemble.py test_unmatched_target_is_named"
    " adapters/test_config.py test_a_name_that_matches_nothing_is_refused_in_a_long_list_too",
    "C5 merging into 4 bits": "adapters/test_bnb.py test_no_merging_in_place",
    "C6 two precisions, or float16 on a CPU": "training/test_validate.py test_what_a_cpu_cannot_do"
    " test_both_precisions_at_once",
    "C7 nothing to train": "training/test_nonfinite.py test_nothing_to_train_is_refused",
    "C8 a DeepSpeed file that is missing or broken": "training/test_arguments.py test_deepspeed_file_is_looked_at_first"
    " training/test_validate.py test_deepspeed_files_that_cannot_work",
    "C9 a DeepSpeed file against the flags": "training/test_validate.py"
    " test_deepspeeds_file_against_the_flags_every_difference_at_once",
    "C10 batch sizes that do not multiply": "training/test_validate.py"
    " test_deepspeeds_file_against_the_flags_every_difference_at_once",
    "C11 rates out of range": "training/test_validate.py test_values_out_of_range",
    "C12 a folder with something in it": "training/test_run_folder.py test_what_is_no_run_is_never_deleted"
    " test_a_run_is_deleted_where_it_is_asked_for test_a_file_among_a_runs_own_is_named_and_kept"
    " scripts/test_train_vit_llm.py test_a_run_is_not_overwritten_unasked"
    " training/test_refused_start.py test_a_run_is_not_deleted_for_one_that_cannot_start"
    " test_the_corrected_call_starts",
    "C13 a folder that cannot be written": "training/test_run_folder.py test_a_folder_that_cannot_be_made_is_refused",
    "C14 a disk too small": "training/test_run_folder.py test_too_little_disk_is_refused_before_the_start"
    " export/test_refused.py test_too_little_disk_or_memory",
    "C15 a hub's name": "models/test_assemble.py test_missing_folder_is_named",
    "C16 YAML that builds objects": "training/test_arguments.py test_yaml_that_builds_objects_is_refused"
    " training/test_validate.py test_yaml_with_aliases_is_not_read",
    "C17 code in a folder": "models/test_wrong_inputs.py test_wrong_input",
    "K1 a missing shard": "files/test_tensors.py test_a_missing_a_truncated_and_an_emptied_shard",
    "K2 a truncated safetensors file": "files/test_tensors.py test_a_missing_a_truncated_and_an_emptied_shard"
    " runs/test_checkpoints.py test_damage_is_found_and_the_older_checkpoint_used",
    "K3 a flipped bit": "runs/test_checkpoints.py test_damage_is_found_and_the_older_checkpoint_used"
    " test_prune_never_counts_a_damaged_checkpoint"
    " faults/test_fuzz_checkpoints.py test_damage_is_never_taken_for_a_checkpoint training/test_run_folder.py"
    " test_without_a_valid_checkpoint_nothing_is_resumed_and_nothing_touched",
    "K4 a truncated torch file": "models/test_vision.py"
    " test_truncated_and_poisoned_torch_files_are_named_and_run_nothing",
    "K5 a pickle with code": "models/test_wrong_inputs.py test_wrong_input models/test_projector.py"
    " test_pickled_code_does_not_run adapters/test_load.py test_a_pickle_runs_nothing scripts/test_train_vit_llm.py"
    " test_no_file_of_a_checkpoint_is_a_pickle",
    "K6 decoys and leftovers": "training/test_run_folder.py test_leftovers_and_decoys_do_not_hinder"
    " test_a_checkpoint_under_another_step_is_refused test_a_checkpoint_of_another_seed_is_refused",
    "K7 an adapter of another base": "export/test_refused.py test_another_base"
    " training/test_run_folder.py test_models_of_one_shape_have_different_fingerprints",
    "K8 a projector of another shape": "models/test_projector.py test_other_towers_are_named"
    " test_no_matching_key_is_an_error",
    "K9 a tokenizer of another vocabulary": "models/test_wrong_inputs.py test_wrong_input",
    "K10 resumed with another configuration": "training/test_run_folder.py test_what_changed_is_refused_unless_allowed",
    "K11 resumed on another number of ranks or stage": "training/test_zero.py"
    " test_other_stages_and_world_sizes_go_on_where_one_stopped",
    "K12 wrong tensors": "training/test_checkpoint.py test_wrong_tensors_are_named"
    " adapters/test_load.py test_a_damaged_folder_is_refused",
    "K13 paths and links out of the folder": "models/test_vision.py test_a_missing_shard_is_named"
    " runs/test_checkpoints.py test_damage_is_found_and_the_older_checkpoint_used",
    "K14 a file where a folder belongs": "models/test_wrong_inputs.py test_wrong_input",
    "R1 SIGTERM and SIGINT": "training/callbacks/test_preemption.py test_under_deepspeeds_launcher"
    " faults/test_signals.py test_a_signal_pauses_and_the_next_life_goes_on",
    "R2 one rank killed": "faults/test_kills.py test_two_ranks"
    " training/callbacks/test_preemption.py test_a_lost_rank_is_told_in_one_line"
    " training/test_watchdog.py test_the_dead_are_named",
    "R3 killed inside a save": "faults/test_kills.py test_inside_a_save",
    "R4 a disk full inside a save": "faults/test_disk.py test_disk_full",
    "R5 out of memory": "training/test_nonfinite.py test_lack_of_memory_in_one_line_with_numbers",
    "R6 a port in use": "training/test_process_group.py test_a_port_in_use_is_named",
    "R7 an error in a loader process": "data/test_loader.py test_every_rank_names_the_record_of_one",
    "R8 NaN": "training/test_nonfinite.py test_a_step_that_is_not_finite_stops_the_run",
    "R9 clocks": "training/test_run_folder.py test_nothing_in_it_uses_file_times",
    "R10 two runs in one folder": "runs/test_checkpoints.py test_second_process_on_one_folder_is_refused",
    "R11 a rank that stands still": "faults/test_stopped.py test_a_stopped_rank_is_named test_a_suspended_run_goes_on"
    " training/test_watchdog.py test_a_silent_rank_is_named",
    "R12 text against images": "training/test_zero.py"
    " test_text_and_images_on_different_ranks_do_not_wait_for_each_other",
}


def test_the_tables_are_whole():
    numbers = [case.split()[0] for case in CASES]
    assert numbers == [
        *(f"C{k}" for k in range(1, 18)),
        *(f"K{k}" for k in range(1, 15)),
        *(f"R{k}" for k in range(1, 13)),
    ]


@pytest.mark.parametrize("case", CASES)
def test_its_tests_are_there(case):
    file = None
    for word in CASES[case].split():
        if word.endswith(".py"):
            file = (HERE / word).read_text(encoding="utf-8")
        else:
            assert re.search(rf"^def {word}\(", file, re.MULTILINE), word
