"""What an engine of an evaluation is given, and the key that its figures are kept under."""

from __future__ import annotations

from specattn_vllm.evaluation.schema import Setting


def test_a_job_s_key_follows_what_its_figures_depend_on(half, job):
    keys = [
        job().key,
        job(half).key,
        job(context=101).key,
        job(documents=[[1, 2, 3], [4, 5, 7]]).key,
        job(models={"target": {"weights": "c"}, "draft": {"weights": "b"}}).key,
        job(engine_options={"max_num_batched_tokens": 8192}).key,
    ]
    assert len(set(keys)) == len(keys)
    assert job(target="/elsewhere/target").key == job().key


def test_engines_are_pruned_below_the_crossover_too(half, job):
    assert job(half).engine_arguments()["additional_config"] == {"specattn": {"crossover_tokens": 0} | half.options}


def test_a_target_that_drafts_for_itself_is_its_own_draft_model(half, job):
    own = Setting(name="own", options={"method": "vegas"})
    assert own.lossless
    assert job(own).engine_arguments()["speculative_config"]["model"] == "/somewhere/target"
    assert job(half).engine_arguments()["speculative_config"]["model"] == "/somewhere/draft"


def test_what_the_user_gives_the_engine_goes_before_ours(job):
    assert job(engine_options={"max_num_batched_tokens": 64}).engine_arguments()["max_num_batched_tokens"] == 64


def test_a_baseline_is_neither_the_reference_nor_lossless_and_runs_without_graphs(half, quest, job, result_of):
    assert not quest.is_reference and not quest.lossless
    assert not result_of(job(quest)).model_copy(update={"baseline": quest.baseline.model_dump()}).is_reference
    arguments = job(quest, device="cuda").engine_arguments()
    assert arguments["enforce_eager"] and arguments["additional_config"]["specattn"]["method"] == "dense"
    assert "enforce_eager" not in job(half, device="cuda").engine_arguments()
    other = quest.model_copy(update={"baseline": quest.baseline.model_copy(update={"page_size": 8})})
    assert job(other).key != job(quest).key


def test_an_fp8_cache_is_the_settings_own_and_no_reference(job):
    setting = Setting(name="eight", options={"method": "dense"}, fp8_cache=True)
    assert job(setting).engine_arguments()["kv_cache_dtype"] == "fp8"
    assert not setting.is_reference and not setting.lossless
    other = Setting(name="as computed", options={"method": "dense"})
    assert "kv_cache_dtype" not in job(other).engine_arguments()
    assert other.is_reference and other.lossless


def test_the_dense_run_in_other_batches_is_not_the_reference_and_has_other_shapes(job, result_of):
    setting = Setting(name="again", options={"method": "dense"}, other_batches=True)
    assert not setting.is_reference and setting.lossless and job(setting).key != job().key
    shapes = {"max_num_batched_tokens": 2048, "enforce_eager": True}
    arguments = job(setting, batch=7, engine_options=shapes).engine_arguments()
    assert (arguments["max_num_seqs"], arguments["max_num_batched_tokens"]) == (3, 1000)
    assert arguments["enforce_eager"]
    # A round of every request has to fit.
    assert job(setting, batch=400).engine_arguments()["max_num_batched_tokens"] == 2000
    assert job(setting, batch=1).engine_arguments()["max_num_seqs"] == 1
    again = result_of(job(setting)).model_copy(update={"other_batches": True})
    assert not again.is_reference and result_of(job()).is_reference
