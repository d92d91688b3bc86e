"""Single rows of surveyed files as conversations, read again from where the survey saw them."""

from collections.abc import Iterable, Iterator
from typing import IO, TYPE_CHECKING

from core.data import Conversation
from core.data_files import BOM, MAX_LINE_BYTES
from core.data_pieces import row_of
from core.data_rows import RowError, names_of, read_row
from core.errors import FinetuiError

if TYPE_CHECKING:
    from core.data_ledger import Ledger
    from core.data_survey import Survey


class Reader:
    """The conversations of one surveyed file by their number. Holds the file open; one row is kept."""

    def __init__(self, survey: "Survey") -> None:
        self.survey = survey
        self._names = names_of(survey.mapping)
        self._stream: IO[bytes] | None = None
        self._kept: tuple[int, list[Conversation]] = (-1, [])

    def __getitem__(self, conversation: int) -> Conversation:
        """Raises FinetuiError where the file is not what it was when it was surveyed."""
        row = int(self.survey["row"][conversation])
        if self._kept[0] != row:
            self._kept = row, self._read(row)
        part = int(self.survey["part"][conversation])
        return self._kept[1][max(part - 1, 0)]

    def _read(self, row: int) -> list[Conversation]:
        survey = self.survey
        try:
            reading = read_row(self.raw(row), self._names)
        except (RowError, OSError) as error:
            raise FinetuiError(
                f"{survey.file} was changed while it was in use ({error}).", "Start again with the file as it is now."
            ) from error
        line = int(survey["line"][row])
        return [Conversation(survey.file, line, *pair, reading.tools) for pair in reading.pairs]

    def raw(self, row: int) -> object:
        """The row as its JSON says, before any shape was looked for. Raises OSError."""
        return row_of(self.text(row), self.survey.spooled)

    def text(self, row: int) -> bytes:
        """The row's line of JSON. Raises OSError."""
        if self._stream is None:
            self._stream = open(self.survey.rows_path, "rb")
        offset = int(self.survey["offset"][row])
        self._stream.seek(offset)
        line = self._stream.readline(MAX_LINE_BYTES + 1).removesuffix(b"\n")
        return line if offset else line.removeprefix(BOM)

    def close(self) -> None:
        if self._stream:
            self._stream.close()
            self._stream = None


class Rows:
    """The conversations of a ledger's files by their number in the ledger."""

    def __init__(self, ledger: "Ledger") -> None:
        self._ledger = ledger
        self._readers = [Reader(source.survey) for source in ledger.sources]

    def __getitem__(self, conversation: int) -> Conversation:
        number, at = self._ledger.place(int(conversation))
        return self._readers[number][at]

    def each(self, conversations: Iterable[int]) -> Iterator[Conversation]:
        """Conversations in the order asked for, which is quick where it is the files' own."""
        return (self[number] for number in conversations)

    def close(self) -> None:
        for reader in self._readers:
            reader.close()
