"""What a model is besides its weights, so that no result of one model is taken for another's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import JsonValue

from sleb.records.base import Record

SCORING_VERSION = 1
"""Raised by hand when the same model and text give other scores: a run of another version is not resumed."""
ANALYSIS_VERSION = 1
"""Raised by hand when the same block outputs would be sampled or computed otherwise: cached ones are computed again."""
EVALUATION_VERSION = 1
"""Raised by hand when the same list gets another answer: an earlier finding does not answer the question again."""

_LONGEST = 60  # characters of a name or a value in a sentence


class ModelIdentity(Record):
    """Everything on which the numbers of a model depend, besides its weights and their type."""

    config: dict[str, JsonValue]
    """Fields of the loaded config that take part in computing and differ from the default of its class."""
    tokenizer: str
    """Hash of vocabulary, merges, normalisation and special tokens."""
    chat_template: str | None = None
    """Hash of the chat template; None without one."""
    end_tokens: tuple[int, ...] = ()
    """Token ids at which generation stops."""
    remote_code: str | None = None
    """Hash of the model's own Python files; None where transformers' code runs."""

    def key(self, weights_hash: str, dtype: str) -> str:
        """Equal for models that answer alike: 32 hexadecimal digits over all of this, the weights and their type."""
        everything = [weights_hash, dtype, self.model_dump(mode="json")]
        return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:32]

    def differences(self, now: ModelIdentity, defaults: Mapping[str, Any] | None = None) -> list[str]:
        """The differences to a model that is there now, in words. `defaults` are the fields of its config's class."""
        usual = dict(defaults or {})  # for whole fields: a value that one of them lacks inside is not a default
        before, after = dict(_flat(usual | self.config)), dict(_flat(usual | now.config))
        names = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
        names.sort(key=lambda name: (name != "model_type", name))  # which explains the others
        changes = [f"{name[:_LONGEST]} was {_shown(before, name)} and is {_shown(after, name)}" for name in names]
        if self.tokenizer != now.tokenizer:
            changes.append("the tokenizer is another one")
        if self.chat_template != now.chat_template:
            changes.append("the chat template is another one")
        if self.end_tokens != now.end_tokens:
            changes.append(f"the end-of-sequence tokens were {list(self.end_tokens)} and are {list(now.end_tokens)}")
        if self.remote_code != now.remote_code:
            changes.append("the model's own code is another one")
        return changes


def _flat(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(fields: Mapping[str, Any], name: str) -> str:
    if name not in fields:
        return "not there"
    text = json.dumps(fields[name])
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
