"""Tasks out of bytes: whatever is in them, however they are cut, wherever they end."""

import json

import pytest
from builders import export_line, framework_task
from hypothesis import given, settings
from hypothesis import strategies as st

from synthgen import _stream
from synthgen._stream import iter_tasks

#: Characters at which readers of text cut lines, or bytes, or JSON.
TRAPS = st.sampled_from("\u2028\u2029\x85\x0b\x0c\x1c\x00\n\r\ud800\udfff\ufeff\uffff🙂é\\\"{}[],:")
texts = st.text(st.characters(blacklist_categories=[]) | TRAPS)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
tasks = st.dictionaries(texts, values, max_size=4)


@st.composite
def exports(draw):
    """An export: its bytes, and the tasks in it."""
    lines = draw(st.lists(st.lists(tasks, max_size=3), max_size=3))
    escaped = draw(st.booleans())
    layout = draw(st.sampled_from([{}, {"indent": 1}, {"separators": (",", ":")}]))

    def encoded(line):
        around = {"before": draw(values), "tasks": line, "total": 12, "tasks_of_others": [1]}
        try:
            return json.dumps(around, ensure_ascii=escaped, **layout).encode("utf-8")
        except UnicodeEncodeError:  # half a surrogate pair can only come as an escape
            return json.dumps(around, **layout).encode("ascii")

    return b"\n".join(map(encoded, lines)), [task for line in lines for task in line]


def cut(data, sizes):
    """The bytes in pieces of these sizes, one after the other, over and over."""
    start = number = 0
    while start < len(data):
        size = sizes[number % len(sizes)]
        yield data[start : start + size]
        start, number = start + size, number + 1


def received(chunks, one_by_one=True):
    """The tasks of an export, each with the bytes that it was decoded from, or that it was in."""
    return [(task, source) for tasks, source in iter_tasks(chunks, one_by_one) for task in tasks]


def same(one, other):
    """Equal as JSON: NaN is itself, and 1 is not true."""
    return json.dumps(one) == json.dumps(other)


@given(exports(), st.lists(st.integers(1, 50), min_size=1, max_size=5))
@settings(max_examples=50)
def test_any_tasks_cut_into_any_reads_come_out_whole(export, sizes):
    """The values, in order, and the bytes that say so."""
    data, expected = export

    found = received(cut(data, sizes))

    assert same([value for value, _ in found], expected)
    assert same([json.loads(source) for _, source in found], expected)
    assert all(source in data for _, source in found)
    assert same([value for value, _ in received(cut(data, sizes), one_by_one=False)], expected)


@given(exports(), st.data(), st.booleans())
@settings(max_examples=50)
def test_an_export_that_ends_anywhere_gives_no_wrong_task(export, data, one_by_one):
    """It is an error, or it gives the first of the tasks: how many there should be is for the counts to say."""
    whole, expected = export
    end = data.draw(st.integers(0, len(whole)))
    found = []

    try:
        for values, _ in iter_tasks(cut(whole[:end], [7]), one_by_one):
            found.extend(values)
    except EOFError:
        pass

    assert same(found, expected[: len(found)])


@given(exports(), st.data(), st.binary(max_size=60))
@settings(max_examples=50)
def test_any_bytes_come_to_an_end_without_any_other_error(export, data, garbage):
    """After any part of an export."""
    whole, _ = export
    end = data.draw(st.integers(0, len(whole)))

    try:
        received([whole[:end], garbage])
    except (EOFError, ValueError):
        pass


@pytest.mark.parametrize(
    "data",
    [
        b"<html>502 Bad Gateway</html>",
        b"null",
        b"[]",
        b'{"tasks": [{"a": 1}] "total" 1}',
        b'{"tasks": [{"a": nothing, "long enough to be no cut": 1}]}',
        b'{"tasks": [{"a": "\xff\xff"}]}',
        b'{"tasks" []}',
        b'{"tasks": [' + b"[" * 200_000 + b"]" * 200_000 + b"]}",
    ],
    ids=lambda data: repr(data[:20]),
)
def test_what_is_no_export_is_an_error(data):
    """A ValueError, not a cut that might be read again with more luck."""
    with pytest.raises(ValueError):
        received([data])


@pytest.mark.parametrize(
    "data",
    [b"{", b'{"tasks"', b'{"tasks":', b'{"tasks": [', b'{"tasks": [{"a": 1}', b'{"tasks": [{"a": 1}]', b'{"total": 12']
    + [b'{"tasks": [%b' % task for task in (b"-", b"1", b'{"a": tru', b'{"a": "\\ud83', b'{"a": "\xf0\x9f')],
)  # fmt: skip
def test_an_end_within_a_line_is_a_cut(data):
    """In a token, an escape, a number, a character, or between."""
    with pytest.raises(EOFError):
        received([data])


@pytest.mark.parametrize("data", [b"", b"\n", b" \r\n", b'{"tasks": [], "total": 0}\n', b'{"total": 0}', b"{}"])
def test_an_export_without_tasks_has_none(data):
    """Also one without a byte: the batch's counts say whether that is right."""
    assert received([data] if data else []) == []


@pytest.mark.parametrize("size", [1, 10, 100, 1000, 100_000])
def test_tasks_that_look_like_the_end_of_another_come_out_whole(size):
    """Decoded several at a time: a task within a task, in a text, at the end of a line, and beside what is no task."""
    inner = {"message_id": "m", "n": 1}
    tasks = [inner, {"message_id": "m", "in": [inner, inner]}, inner, {"message_id": json.dumps([inner] * 2)}] * 3
    others = [inner, 1, 12, 123, inner]
    lines = export_line(tasks) + export_line(others) + export_line(tasks)

    for one_by_one in (True, False):
        found = received(cut(lines, [size]), one_by_one)
        assert [value for value, _ in found] == [*tasks, *others, *tasks]


def test_a_task_is_given_before_the_next_read():
    """Nothing waits for the end of a line."""
    line = export_line([framework_task(1), framework_task(2)])
    end = line.index(b'{"message_id": "2"')

    def reads():
        yield line[:end]
        raise AssertionError("read on")

    (value,), _ = next(iter_tasks(reads(), False))

    assert value["message_id"] == "1"


@pytest.fixture
def scans(monkeypatch):
    """How many bytes were looked through each time for the end of a value."""
    lengths = []
    length_of_value = _stream._length_of_value

    def counting(data):
        lengths.append(len(data))
        return length_of_value(data)

    monkeypatch.setattr(_stream, "_length_of_value", counting)
    return lengths


@pytest.mark.parametrize(
    "huge",
    ["x" * 1_000_000, ["x"] * 200_000, "🙂" * 100_000, [{"a": {"b": [1.5, None]}}] * 30_000],
    ids=["text", "list", "emoji", "nested"],
)
def test_a_huge_task_is_scanned_a_few_times_and_not_once_per_read(scans, huge):
    """In all no more than a few times its length, however small the reads are."""
    line = export_line([{"message_id": "1", "huge": huge}])

    ((value, _),) = received(cut(line, [1000]))

    assert value["huge"] == huge
    assert sum(scans) < 4 * len(line)


@pytest.mark.parametrize("one_by_one", [True, False])
@pytest.mark.parametrize("layout", [{}, {"indent": 1}, {"separators": (",", ":")}], ids=["wide", "indented", "dense"])
def test_many_tasks_are_found_by_how_they_start(scans, layout, one_by_one):
    """However a server writes its JSON; only the one that a read cuts in two is looked through."""
    exported = [framework_task(number) for number in range(2000)]
    line = json.dumps({"tasks": exported}, **layout).encode("ascii")

    found = received(cut(line, [65536]), one_by_one)

    assert [value for value, _ in found] == exported
    assert len(scans) <= len(line) // 65536 + 4  # a key, and the first task


@pytest.mark.parametrize("one_by_one", [True, False])
def test_tasks_of_short_lines_are_found_by_how_they_start(scans, one_by_one):
    """One that starts so in the next line is no reason to look through all that a read brought."""
    exported = [framework_task(number) for number in range(2000)]
    lines = b"".join(export_line(exported[start : start + 100]) for start in range(0, 2000, 100))

    found = received([lines], one_by_one)

    assert [value for value, _ in found] == exported
    assert len(scans) < len(exported) / 2


@pytest.mark.parametrize("one_by_one", [True, False])
@pytest.mark.parametrize("size", [10, 5000, 1_000_000])
def test_tasks_that_start_in_many_ways_come_out_whole(size, one_by_one):
    """With their keys in any order, and with others like them inside."""
    exported = []
    for number in range(300):
        inner = [{"message_id": "x"}, {"source": '}, {"message_id"'}]
        keys = [("message_id", str(number)), ("source", inner), ("n", 1)]
        exported.append(dict(keys[number % 3 :] + keys[: number % 3]))

    found = received(cut(export_line(exported), [size]), one_by_one)

    assert [value for value, _ in found] == exported
    assert not one_by_one or [json.loads(source) for _, source in found] == exported
