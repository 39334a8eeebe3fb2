"""An upload, taken apart while it arrives: fields are kept, the file goes to the disk and through the checks."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import unicodedata
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from ift_peft.errors import is_full
from ift_peft.serve.errors import ApiError, no_room
from ift_peft.serve.files.lines import LineChecker, shown
from ift_peft.serve.files.records import TEMPORARY
from ift_peft.serve.settings import Limits

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FIELDS = ("file", "purpose", "expires_after[anchor]", "expires_after[seconds]")
FIELD_BYTES = 1024
OVERHEAD = 64 * 1024  # of a form beside its file
EXPIRES = range(3600, 2_592_001)
PURPOSE = "fine-tune"


class Upload:
    """The form of one upload, written piece by piece; a context manager that leaves no file behind.

    The first fault of the form is kept while the rest is read, so that the client, which is still sending, gets to
    read the answer; only what is too large is refused at once.
    """

    def __init__(self, folder: Path, content_type: str, limits: Limits) -> None:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise ApiError(
                400, "Expected a multipart/form-data body with a boundary.", code="invalid_content_type", param="file"
            )
        self.limits, self.checker = limits, LineChecker(limits)
        self.values: dict[str, bytes] = {}
        self.filename: str | None = None
        self._fault: ApiError | None = None
        self._received = 0
        self._headers: dict[bytes, bytes] = {}
        self._header, self._value = bytearray(), bytearray()
        self._field: str | None = None
        self._ended = False
        self._digest = hashlib.sha256()
        self._refuse_size = ApiError(
            413, f"The file is larger than {limits.upload_bytes:,} bytes.", code="file_too_large", param="file"
        )
        callbacks: MultipartCallbacks = {
            "on_part_begin": self._begin_part,
            "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._begin_content,
            "on_part_data": self._content,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }
        try:
            self._parser = MultipartParser(options[b"boundary"], callbacks)
        except FormParserError as error:
            raise ApiError(400, str(error), code="invalid_content_type", param="file") from None
        try:
            handle, name = tempfile.mkstemp(dir=folder, prefix=TEMPORARY)
        except OSError as error:
            raise _disk(error) from None
        self.path = Path(name)
        self._file = os.fdopen(handle, "wb")

    def __enter__(self) -> Upload:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # of a full disk, once more; `finish` has told it, or nobody waits for the file
            self._file.close()
        self.path.unlink(missing_ok=True)

    def write(self, piece: bytes) -> None:
        """The next bytes of the body. Raises `ApiError`: 413, 400 for what is no form, 507 on a full disk."""
        self._received += len(piece)
        if self._received > self.limits.upload_bytes + OVERHEAD:
            raise self._refuse_size
        try:
            self._parser.write(piece)
        except FormParserError:
            raise ApiError(400, "The multipart body cannot be read.", code="invalid_multipart", param="file") from None
        except OSError as error:
            raise _disk(error) from None

    def finish(self) -> None:
        """The body has ended: all of the file is on the disk. Raises `ApiError` with all that is wrong with it."""
        if not self._ended:
            raise ApiError(400, "The multipart body ends before its last boundary.", code="invalid_multipart")
        if self._fault is not None:
            raise self._fault
        self._check_fields()
        self.checker.close()
        if self.checker.faults:
            raise ApiError(400, self.checker.message, code="invalid_file_format", param="file")
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _disk(error) from None

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    @property
    def seconds(self) -> int | None:
        """Until the file expires."""
        given = self.values.get("expires_after[seconds]")
        return None if given is None else int(given)

    def _check_fields(self) -> None:
        if self.filename is None:
            raise ApiError(400, "'file' is a required property.", code="missing_required_parameter", param="file")
        purpose = self.values.get("purpose")
        if purpose is None:
            raise ApiError(400, "'purpose' is a required property.", code="missing_required_parameter", param="purpose")
        if purpose != PURPOSE.encode():
            raise ApiError(
                400, f"Files are kept for one purpose here: {PURPOSE!r}.", code="invalid_value", param="purpose"
            )
        anchor, seconds = (self.values.get(f"expires_after[{name}]") for name in ("anchor", "seconds"))
        if anchor is None and seconds is None:
            return
        if anchor != b"created_at":
            raise ApiError(400, "The anchor is 'created_at'.", code="invalid_value", param="expires_after.anchor")
        if seconds is None or not re.fullmatch(rb"[0-9]{1,9}", seconds) or int(seconds) not in EXPIRES:
            raise ApiError(
                400,
                f"A file expires after {EXPIRES[0]} to {EXPIRES[-1]} seconds.",
                code="invalid_value",
                param="expires_after.seconds",
            )

    def _begin_part(self) -> None:
        self._headers.clear()
        self._header.clear()
        self._value.clear()

    def _end_header(self) -> None:
        self._headers[bytes(self._header).lower()] = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _begin_content(self) -> None:
        disposition, options = parse_options_header(self._headers.get(b"content-disposition"))
        name = options.get(b"name", b"").decode("utf-8", errors="replace")
        self._field = None
        if disposition != b"form-data" or name not in FIELDS:
            self._keep(
                ApiError(400, f"Unrecognized field of the form: {shown(name)}.", code="unknown_parameter", param="file")
            )
        elif name in self.values or (name == "file" and self.filename is not None):
            self._keep(ApiError(400, f"{name} is given twice.", code="invalid_value", param=name))
        elif name == "file":
            self._begin_file(options)
        else:
            self._field = name
            self.values[name] = b""

    def _begin_file(self, options: dict[bytes, bytes]) -> None:
        coding = self._headers.get(b"content-transfer-encoding", b"binary").strip().lower()
        if b"filename" not in options:
            self._keep(ApiError(400, "Send 'file' as a file, with a name.", code="invalid_value", param="file"))
        elif coding not in (b"binary", b"8bit", b"7bit"):
            self._keep(ApiError(400, "Send the file as it is, not encoded.", code="invalid_value", param="file"))
        else:
            self._field = "file"
            self.filename = display_name(options[b"filename"].decode("utf-8", errors="replace"))

    def _content(self, data: bytes, start: int, end: int) -> None:
        if self._field == "file":
            if self.checker.bytes + end - start > self.limits.upload_bytes:
                raise self._refuse_size
            piece = data[start:end]
            if not self.checker.faulty:  # what will not be kept is not written
                self._file.write(piece)
                self._digest.update(piece)
            self.checker.feed(piece)
        elif self._field is not None:
            value = self.values[self._field]
            if len(value) + end - start > FIELD_BYTES:
                self._keep(ApiError(400, f"{self._field} is too long.", code="invalid_value", param=self._field))
            else:
                self.values[self._field] = value + data[start:end]

    def _end_part(self) -> None:
        self._field = None

    def _end(self) -> None:
        self._ended = True

    def _keep(self, fault: ApiError) -> None:
        self._fault = self._fault or fault


def display_name(name: str) -> str:
    """A file's name as it may be shown: no folders, no control characters, 200 characters at most."""
    last = re.split(r"[/\\]", name)[-1]
    plain = "".join(one for one in last if not unicodedata.category(one).startswith("C")).strip()
    return plain[-200:] or "file"


def _disk(error: OSError) -> Exception:
    return no_room() if is_full(error) else error
