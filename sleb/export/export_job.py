"""The export job of a run: checks the request, then writes and proves the smaller model."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from sleb.errors import OptionError
from sleb.export import gguf_file, gguf_plan
from sleb.export.checkpoint import export_checkpoint
from sleb.export.destination import Destination
from sleb.export.proven_folder import Origin
from sleb.formats.model_card import model_card
from sleb.model.inspection import licence
from sleb.model.inspection.source_folder import source_folder
from sleb.model.loading import LoadedModel
from sleb.model.model_of_run import require_same_model
from sleb.records import ExportJob, Run
from sleb.runtime import findings_folder, job_folder
from sleb.runtime.processes.progress import Meter

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A checked export job: what it removes, where it writes, and the GGUF file that it cuts, if it writes one."""

    removal_list: tuple[int, ...]
    out: Path
    gguf: Path | None


def plan_of(run: Run, job: ExportJob) -> Plan:
    """The plan of a job, checked before the model is loaded. Raises `OptionError`, `RunError`, `ExportError`."""
    if job.out is None:
        raise OptionError("An export needs a folder to write: name one with `out`.")
    out, removal_list = Path(job.out), run.removal_list_after(job.steps)
    if job.format != "gguf":
        Destination(out, job.replace).require_free()
        return Plan(removal_list, out, None)
    source = gguf_plan.source_of(run, job)
    gguf_plan.destination_of(out, job.replace, source).require_free()
    gguf_plan.plan_cut(source, removal_list)
    return Plan(removal_list, out, source)


def export(run: Run, job: ExportJob, job_dir: Path, plan: Plan, loaded: LoadedModel, meter: Meter) -> None:
    """Write the smaller model, prove it, and keep the proof with the job."""
    if job.gguf is None:
        require_same_model(run, job, loaded)
        if run.stack is not None and run.stack.identity is None:
            log.warning("Run %s does not say with which config it began: only its weights were compared.", run.run_id)
    if plan.gguf is None:
        findings = findings_folder.findings(run.run_dir)
        proof = export_checkpoint(
            loaded.model,
            loaded.tokenizer,
            plan.removal_list,
            plan.out,
            model_card(
                run, plan.removal_list, licence=licence.of_model(run.spec.model, loaded.revision), findings=findings
            ),
            allow_existing=job.replace,
            progress=meter.phase,
            source=source_folder(loaded.name, loaded.revision),
            origin=Origin.of(run),
            trust_remote_code=job.trust_remote_code,
            memory_budget=job.memory_budget,
        )
    else:
        if job.gguf is not None:
            gguf_file.require_same_model(run, plan.gguf, loaded.model)
        proof = gguf_file.export_gguf(
            loaded.model,
            loaded.tokenizer,
            plan.gguf,
            plan.removal_list,
            plan.out,
            run.run_id,
            allow_existing=job.replace,
            progress=meter.phase,
            origin=Origin.of(run),
            trust_remote_code=job.trust_remote_code,
        )
    job_folder.write_result(job_dir, {"out": job.out, "proof": proof.model_dump(mode="json")})
