from grainmill.worker import Job, work


def test_every_epoch_is_reported_with_the_names_of_its_metrics(tmp_path):
    reports = []
    work(Job("toy", {"epochs": 2, "height": 1.0}, {}, str(tmp_path)), reports.append)
    names = ["epoch", "score", "cost", "world_size"]
    assert reports == [
        {"epoch": 1, "score": 0.5, "cost": 1.0, "world_size": 1.0, "reported": names},
        {"epoch": 2, "score": 1.0, "cost": 1.0, "world_size": 1.0, "reported": names},
    ]


def test_finished_job_reports_its_last_epoch_again(tmp_path):
    job = Job("toy", {"epochs": 2}, {}, str(tmp_path))
    work(job, [].append)
    reports = []
    work(job, reports.append)
    assert [report["epoch"] for report in reports] == [2]
