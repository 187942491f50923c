"""A table as batches and back: a prompt a row, answers beside the rows, and a note of what was submitted, so that the
same command goes on after whatever stopped it.
"""

import hashlib
import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tidegate.cli.output import Problem
from tidegate.wire.batch import LINES_MAX

ROWS_MAX = 10_000_000


class Table:
    """One run: the same input, prompt, model and options find the batches of an earlier run again."""

    def __init__(
        self,
        source: Path,
        to: Path | None,
        prompt: str,
        column: str,
        model: str,
        *,
        max_tokens: int | None = None,
        system: str | None = None,
    ) -> None:
        self._rows = _read(source)
        self._to = to or source.with_suffix(f".results{source.suffix}")
        self._prompt, self._column, self._model = prompt, column, model
        self._max_tokens, self._system = max_tokens, system
        self._answers: dict[int, str] = {}
        self._errors: dict[int, str] = {}
        self._check_columns()
        what = json.dumps([str(source.resolve()), source.stat().st_mtime_ns, prompt, model, max_tokens, system])
        digest = hashlib.sha256(what.encode()).hexdigest()[:12]
        self._notes = self._to.with_name(f".{self._to.name}.{digest}.json")

    def parts(self) -> range:
        """A batch takes `LINES_MAX` rows."""
        return range(-(-len(self._rows) // LINES_MAX))

    def lines(self, part: int) -> Iterator[bytes]:
        for number in range(part * LINES_MAX, min((part + 1) * LINES_MAX, len(self._rows))):
            row = self._rows.row(number, named=True)
            messages = [{"role": "user", "content": self._prompt.format_map({k: _text(v) for k, v in row.items()})}]
            if self._system is not None:
                messages.insert(0, {"role": "system", "content": self._system})
            body: dict[str, Any] = {"model": self._model, "messages": messages}
            if self._max_tokens is not None:
                body["max_tokens"] = self._max_tokens
            line = {"custom_id": f"row-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            yield json.dumps(line, ensure_ascii=False).encode() + b"\n"

    def submitted(self, part: int) -> str | None:
        return self._noted().get(str(part))

    def note(self, part: int, batch_id: str) -> None:
        self._notes.write_text(json.dumps(self._noted() | {str(part): batch_id}))

    def forget(self, part: int) -> None:
        """Its batch failed: the next run submits these rows again."""
        self._notes.write_text(json.dumps({key: batch for key, batch in self._noted().items() if key != str(part)}))

    def take(self, results: bytes) -> None:
        """Lines of an output or error file."""
        for line in results.splitlines():
            result = json.loads(line)
            number = int(result["custom_id"].removeprefix("row-"))
            response = result["response"]
            if response is not None and response["status_code"] == 200:
                self._answers[number] = response["body"]["choices"][0]["message"]["content"] or ""
            else:
                self._errors[number] = _why(result)

    def write(self) -> dict[str, Any]:
        """Rows with their answers; a column of errors beside it where there are any."""
        import polars

        count = range(len(self._rows))
        made = [polars.Series(self._column, [self._answers.get(n) for n in count], dtype=polars.String)]
        if self._errors:
            name = f"{self._column}_error"
            made.append(polars.Series(name, [self._errors.get(n) for n in count], dtype=polars.String))
        rows = self._rows.with_columns(made)
        if self._to.suffix == ".parquet":
            rows.write_parquet(self._to)
        else:
            rows.write_csv(self._to)
        self._notes.unlink(missing_ok=True)
        return {
            "rows": len(rows),
            "answered": len(self._answers),
            "failed": len(self._errors),
            "written": str(self._to),
        }

    def _noted(self) -> dict[str, str]:
        return dict(json.loads(self._notes.read_text())) if self._notes.exists() else {}

    def _check_columns(self) -> None:
        known = self._rows.columns
        try:
            asked = [name for _, name, _, _ in string.Formatter().parse(self._prompt) if name is not None]
        except ValueError as error:
            raise Problem(f"--prompt: {error}; a brace that is meant is doubled", exit_code=2) from None
        for name in asked:
            if name not in known:
                message = f"--prompt: there is no column {name!r}; accepted: {', '.join(known)}"
                raise Problem(message, exit_code=2)
        if self._column in known:
            raise Problem(f"--column: {self._column!r} is there already; choose another name", exit_code=2)


def _read(source: Path) -> Any:
    try:
        import polars
    except ImportError:
        raise Problem("tables need polars: pip install 'tidegate[advisor]'") from None
    try:
        match source.suffix:
            case ".csv":
                rows = polars.read_csv(source, infer_schema=False)
            case ".parquet":
                rows = polars.read_parquet(source)
            case other:
                raise Problem(f"--input: {other!r} is not a table; accepted: .csv, .parquet", exit_code=2)
    except OSError as error:
        raise Problem(f"{source}: {error.strerror or 'no such file'}", exit_code=2) from None
    except polars.exceptions.PolarsError as error:
        raise Problem(f"{source}: not a table that can be read ({type(error).__name__})", exit_code=2) from None
    if not 0 < len(rows) <= ROWS_MAX:
        raise Problem(f"{source}: {len(rows)} rows; accepted: 1 to {ROWS_MAX}", exit_code=2)
    return rows


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _why(result: dict[str, Any]) -> str:
    error = result["error"] or result["response"]["body"]["error"]
    return f"{error.get('code')}: {error.get('message')}"
