"""A node that says it has GPUs on a machine where PyTorch sees none."""

import pytest
from commands import run_whole

SCRIPT = """
    import sys
    from pathlib import Path

    import ray
    import toy

    from grainmill.config.resources import Resources
    from grainmill.execution import watchdog, worker_group
    from grainmill.execution.training_job import StudySetup, TrainingJob, epochs
    from grainmill.messages import TrialFailed, WorkersStarted

    folder = Path(sys.argv[1])
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=2,
        object_store_memory=128 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}},
    )
    job = TrainingJob("toy", toy.Spec(), toy.Data(), str(folder / "checkpoints"))
    refused = "a worker that is given a GPU must train on it, but PyTorch"


    @ray.remote(num_gpus=1, num_cpus=0)
    def alone():
        return next(epochs(job))


    try:
        ray.get(alone.remote())
    except Exception as error:
        assert refused in str(error), error

    setup = StudySetup("trial", "toy", toy.Data(), str(folder), Resources(gpus_per_worker=1), 2)
    group, said = worker_group.WorkerGroup(setup, watchdog.start()), []
    group.train(job, said.append)
    assert [type(one) for one in said] == [WorkersStarted, WorkersStarted, TrialFailed], said
    assert refused in said[-1].cause, said
    assert not (folder / "checkpoints").exists()
    group.close()
    ray.shutdown()
    print("nothing lost")
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in Ray Data, which Train imports
def test_workers_that_are_given_a_gpu_and_see_none_do_not_train_on_the_cpu(tmp_path):
    run_whole(SCRIPT, tmp_path)
