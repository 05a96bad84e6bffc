"""What the server may read, write and start: decided by its command line and its address, for every kind of name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from app import access, actions, data
from app.panels import forecast_process, run_form
from sleb import specs
from sleb.errors import RunError
from sleb.evaluation import request
from sleb.records import EvaluateSpec, ExportJob, HealSpec, JobSpec, QuantizeSpec, RunSpec, SearchJob
from sleb.runtime import dashboard_files, run_folder
from tests.support.dashboard import Allow, started_with
from tests.support.runs.stores import write_run


@pytest.fixture
def allow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Allow]:
    with started_with(monkeypatch) as start:
        yield start


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An allowed folder and another one, each with a model and a text; the current folder is the other one."""
    for name in ("allowed", "other"):
        folder = tmp_path / name
        (folder / "owner" / "model").mkdir(parents=True)
        (folder / "owner" / "model" / "config.json").write_text('{"num_hidden_layers": 7}')
        (folder / "text.txt").write_text("some words")
        (folder / "text.jsonl").write_text('{"text": "some words"}')
        (folder / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "allowed" / "link").symlink_to(tmp_path / "other")
    (tmp_path / "allowed" / "half").mkdir()
    (tmp_path / "allowed" / "half" / "config.json").symlink_to(tmp_path / "other" / "text.txt")
    monkeypatch.chdir(tmp_path / "other")
    return tmp_path


def search(model: str, source: str = "demo", **changes: object) -> tuple[RunSpec, JobSpec]:
    spec = specs.run_spec("demo", calibration="demo").model_dump()
    spec["calibration"]["source"] = source
    return RunSpec.model_validate(spec | {"model": model} | changes), SearchJob()


@pytest.mark.parametrize("address", ["localhost", "LOCALHOST", "127.0.0.1", "127.8.9.1", "::1"])
def test_on_localhost_everything_is_as_its_user_may(address: str, allow: Allow, places: Path) -> None:
    allow(address=address)
    assert access.rule().folders is None
    access.require_start(*search(str(places / "other" / "owner" / "model")))
    assert access.explained() == ""
    assert data.num_blocks_of("owner/model") == 7


@pytest.mark.parametrize(
    "address", [None, "", " ", "0.0.0.0", "::", "192.168.1.7", "myhost", "localhost.example", "127.1"]
)
def test_on_any_other_address_no_path_is_taken_unless_it_is_allowed(
    address: str | None, allow: Allow, places: Path
) -> None:
    allow(address=address)
    model = str(places / "allowed" / "owner" / "model")
    with pytest.raises(access.NotAllowed, match="--allow-path DIR"):
        access.require_start(*search(model))
    assert "--allow-path DIR" in access.explained()
    assert access.folder_for_exports() is None
    assert data.num_blocks_of(model) is None
    access.require_start(*search("demo"))
    access.require_start(*search("org/model", "wikitext2"))
    allow(places / "allowed", address=address)
    access.require_start(*search(model))
    assert str(places / "allowed") in access.explained()


def test_folders_that_are_given_hold_on_localhost_too(allow: Allow, places: Path) -> None:
    allow(places / "allowed", address="localhost")
    with pytest.raises(access.NotAllowed, match="--allow-path"):
        access.require_start(*search(str(places / "other" / "owner" / "model")))


@pytest.mark.parametrize("value", ["", "nonsense", '"/"', "{}", "[1]", "null"])
def test_folders_that_cannot_be_read_allow_nothing(value: str, allow: Allow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dashboard_files.ALLOW_PATH, value)
    assert access.rule().folders == ()


@pytest.mark.parametrize(
    "model",
    [
        "{other}/owner/model",
        "{allowed}/../other/owner/model",
        "{allowed}/link/owner/model",
        "{allowed}/half",
        "owner/model",
        "model.gguf",
        "missing.gguf",
        "{other}/model.gguf",
        "~/model",
        "~nobody/model",
        "./model",
        "../allowed/../other/model",
        "owner/..",
        "..",
        "/",
        "a/b/c",
        "x\0y",
        "{home}/signing-key",
    ],
)
def test_a_model_outside_of_the_folders_is_refused(model: str, allow: Allow, places: Path, home: Path) -> None:
    allow(places / "allowed")
    name = model.format(allowed=places / "allowed", other=places / "other", home=home)
    with pytest.raises(access.NotAllowed, match="--allow-path"):
        access.require_start(*search(name))
    assert data.num_blocks_of(name) is None


@pytest.mark.parametrize("model", ["{allowed}/owner/model", "{allowed}/model.gguf", "gpt2", "meta-llama/Llama-2-7b-hf"])
def test_a_model_below_the_folders_or_of_the_hub_is_taken(model: str, allow: Allow, places: Path) -> None:
    allow(places / "allowed")
    access.require_start(*search(model.format(allowed=places / "allowed")))


@pytest.mark.parametrize("revision", ["../../../other", "/etc", "a/../b", "~/x", ".", "a\\b"])
def test_a_revision_is_no_way_out_of_the_hub_s_cache(revision: str, allow: Allow, places: Path) -> None:
    allow(places / "allowed")
    access.require_start(*search("org/model", revision="refs/pr/1"))
    with pytest.raises(access.NotAllowed, match="branch, tag or commit"):
        access.require_start(*search("org/model", revision=revision))


@pytest.mark.parametrize(
    ("source", "fits"),
    [
        ("wikitext2-rows", True),
        ("{allowed}/text.txt", True),
        ("{allowed}/text.jsonl:text", True),
        ("Salesforce/wikitext:wikitext-2-raw-v1:train:text", True),
        ("{other}/text.txt", False),
        ("text.txt", False),
        ("text.jsonl:text", False),
        ("{other}/text.jsonl:text", False),
        ("{allowed}/text.jsonl:../../../other/text.txt", False),
        ("{other}/text.jsonl:/{allowed}/text.txt", False),
        ("{allowed}/link/text.txt", False),
        ("owner/model", False),
        ("owner/missing:../x", False),
        ("json", False),  # a reader of the current folder's files
        ("text::train:text", False),
        ("~/text.txt", False),
    ],
)
def test_a_text_is_below_the_folders_or_of_the_hub(source: str, fits: bool, allow: Allow, places: Path) -> None:
    allow(places / "allowed")
    name = source.format(allowed=places / "allowed", other=places / "other")
    heal = request.job_of(HealSpec(lists=((1,),), source=name))
    for spec, job in (search("demo", name), (search("demo")[0], heal)):
        if fits:
            access.require_start(spec, job)
        else:
            with pytest.raises(access.NotAllowed):
                access.require_start(spec, job)


def test_what_an_evaluation_reads_and_writes_is_below_the_folders(allow: Allow, places: Path) -> None:
    allow(places / "allowed")
    inside, outside = places / "allowed", places / "other"
    spec = search("demo")[0]

    def allowed(job: JobSpec) -> bool:
        try:
            access.require_start(spec, job)
        except access.NotAllowed:
            return False
        return True

    def evaluate(**fields: object) -> JobSpec:
        return request.job_of(EvaluateSpec(lists=((1,),), **fields))  # type: ignore[arg-type]

    (inside / "tasks").mkdir()
    assert allowed(evaluate(texts=("wikitext2", str(inside / "text.txt")), task_folder=str(inside / "tasks")))
    assert allowed(evaluate(texts=(f"{inside}/text.jsonl:text",)))
    assert not allowed(evaluate(texts=("wikitext2", str(outside / "text.txt"))))
    (inside / "lead.jsonl").symlink_to(outside / "text.jsonl")
    assert not allowed(evaluate(texts=(f"{inside}/lead.jsonl:text",)))  # no file has that name, and one is read
    assert not allowed(evaluate(task_folder=str(outside)))
    assert allowed(request.job_of(QuantizeSpec(lists=((1,),), out=str(inside / "new"))))
    assert not allowed(request.job_of(QuantizeSpec(lists=((1,),), out=str(outside / "new"))))
    assert not allowed(request.job_of(HealSpec(lists=((1,),), out=str(inside / "link" / "new"))))
    assert allowed(ExportJob(out=str(inside / "new"), gguf=str(inside / "model.gguf")))
    assert not allowed(ExportJob(out=str(outside / "new")))
    assert not allowed(ExportJob(out=str(run_folder.home() / "runs" / "new")))
    assert not allowed(ExportJob(out=str(inside / "new"), gguf=str(outside / "model.gguf")))


def test_a_run_that_names_a_model_elsewhere_cannot_go_on(allow: Allow, places: Path, home: Path) -> None:
    run = write_run(home / "runs" / "one", 12, 2, model=str(places / "other" / "owner" / "model"))
    allow(places / "allowed")
    with pytest.raises(access.NotAllowed, match="is not below"):
        actions.go_on(run, ExportJob(out=str(places / "allowed" / "new")))
    assert [job.spec.kind for job in data.load("one").jobs] == ["search"]


def test_a_link_in_the_runs_folder_leads_nowhere_else(allow: Allow, places: Path, home: Path) -> None:
    for name in ("allowed", "other"):
        write_run(places / name / "run", 12, 2)
        (home / "runs").mkdir(exist_ok=True)
        (home / "runs" / f"from-{name}").symlink_to(places / name / "run")
    assert data.load("from-other").run_id == "from-other"
    allow(places / "allowed")
    assert data.load("from-allowed").run_id == "from-allowed"
    with pytest.raises(RunError, match="leads out of the folders"):
        data.load("from-other")
    (places / "other" / "run" / "spec.json").write_text('{"a secret": 1}')  # and nothing is said of what is in it
    shown = {each.run_id for each in data.outlines() if not isinstance(each, RunError)}
    assert [str(each) for each in data.outlines() if isinstance(each, RunError)] == [
        "Run from-other is a link that leads out of the folders which this dashboard may use (--allow-path); it is not "
        "shown."
    ]
    assert "from-allowed" in shown
    assert "from-other" not in shown


def test_what_only_shows_starts_changes_and_deletes_nothing(allow: Allow, home: Path) -> None:
    run = write_run(home / "runs" / "one", 12, 2)
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    allow(address="localhost", read_only=True)
    spec, job = search("demo")
    for act in (
        lambda: actions.begin(spec, job),
        lambda: actions.go_on(run, job),
        lambda: actions.go_on(data.load(data.SAMPLE), job),
        lambda: actions.stop(run),
        lambda: actions.delete(run),
        lambda: forecast_process.begin(spec, job),
        lambda: run_form.keep_upload("a.txt", b"some text"),
    ):
        with pytest.raises(access.NotAllowed, match="--read-only"):
            act()
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*")} == before


def test_only_one_module_of_the_dashboard_starts_or_changes_anything() -> None:
    """The rule is asked there, whatever page draws the button."""
    doers = (
        "job_processes.start", "job_processes.stop", "job_processes.delete", "job_processes.bring_in",
        "job_processes.next_job", "run_folder.create", "run_folder.bring_in", "job_folder.create_job", "origin.confirm",
    )  # fmt: skip
    pages = [path for folder in ("app", "pages") for path in (dashboard_files.ROOT / folder).rglob("*.py")]
    outside = {
        path.name for path in pages for doer in doers if f"{doer}(" in path.read_text() and path.name != "actions.py"
    }
    assert len(pages) > 20
    assert outside == set()
