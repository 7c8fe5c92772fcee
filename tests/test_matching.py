"""Each task gets its own result, whatever the server tells of which is which."""

import io
import json
import threading
import tracemalloc
from collections import Counter
from contextlib import closing
from functools import lru_cache

import pytest
from builders import URL, batch, export_line, framework_task, local_task, task
from hypothesis import given
from hypothesis import strategies as st
from servers import DEADLINE, Answer

from synthgen import Monitor, SynthgenClient, Task, TaskResponse
from synthgen._matching import ResultList, result_digest, task_digest
from synthgen._results import ResultFile

OTHER_URL = "http://other.test/v1/chat/completions"


def no_look_up(result):
    raise AssertionError("there is no need to ask")


def matched(tasks, exported, look_up=no_look_up):
    """The message id of each task's result, and the number of surplus results; the same in memory and in a file."""
    sources = [json.dumps(one).encode("ascii") for one in exported]
    responses = [TaskResponse(**one) for one in exported]
    by_id = {one.message_id: one for one in responses}

    @lru_cache(maxsize=None)
    def ask_for(message_id):
        return look_up(by_id[message_id])

    def ask(ids):
        return [ask_for(message_id).model_copy() for message_id in ids]

    found = ResultList(tasks)
    _, surplus = found.match([one.model_copy() for one in responses], ask)
    results = found._results
    for one, result in zip(tasks, results):
        assert result is None or result.custom_id == one.custom_id
    with closing(ResultFile(io.BytesIO())) as file:
        file.note(tasks)
        assert file.match(zip(responses, sources), ask) == (len(list(found)), surplus)
        assert list(file.missing()) == list(found.missing())
        assert [(one.custom_id, one.status) for one in file] == [(one.custom_id, one.status) for one in found]
    return [result and result.message_id for result in results], surplus


# ---------------------------------------------------------------------------------------- one by one


@pytest.mark.parametrize("exported_task", [framework_task, local_task])
def test_shuffled_results_go_to_their_tasks(exported_task):
    """By what identifies a task; the custom_id is put back where the server left it out."""
    tasks = [task("a"), task("b"), task("c")]

    assert matched(tasks, [exported_task(i, tasks[i]) for i in (2, 0, 1)]) == (["0", "1", "2"], 0)


@pytest.mark.parametrize("name", ["dataset", "source"])
@pytest.mark.parametrize("exported_task", [framework_task, local_task])
def test_tasks_alike_in_body_are_told_apart_by_what_else_they_carry(exported_task, name):
    """Without asking for each."""
    values = {"dataset": ["x", None, "y"], "source": [{"row": 1}, None, {"row": 2}]}[name]
    tasks = [task(**{name: value}) for value in values]

    assert matched(tasks, [exported_task(i, tasks[i]) for i in (1, 2, 0)]) == (["0", "1", "2"], 0)


def test_tasks_alike_but_for_their_custom_id_are_asked_for():
    """The framework's export does not tell, its single tasks do."""
    tasks = [task(custom_id=name) for name in ("a", "b", None)]
    asked = []

    def look_up(result):
        asked.append(result.message_id)
        return TaskResponse(**framework_task(result.message_id, custom_id=tasks[int(result.message_id)].custom_id))

    assert matched(tasks, [framework_task(i) for i in (2, 1, 0)], look_up) == (["0", "1", "2"], 0)
    assert sorted(asked) == ["0", "1", "2"]


def test_tasks_alike_but_for_their_custom_id_are_not_asked_for_where_the_export_tells():
    """The embedded server's does."""
    tasks = [task(custom_id=name) for name in ("a", "b", None)]

    assert matched(tasks, [local_task(i, tasks[i]) for i in (2, 1, 0)]) == (["0", "1", "2"], 0)


def test_the_same_body_at_two_urls_is_two_tasks():
    """Where the server says which is which; the custom_id need not."""
    tasks = [task(url=URL), task(url=OTHER_URL), task(url=URL, method="PUT")]

    assert matched(tasks, [local_task(i, tasks[i]) for i in (2, 1, 0)]) == (["0", "1", "2"], 0)


def test_the_same_body_at_two_urls_with_ids_of_their_own_is_asked_for():
    """The framework never tells a URL; it tells the custom_id."""
    tasks = [task(url=URL, custom_id="here"), task(url=OTHER_URL, custom_id="there")]

    def look_up(result):
        return TaskResponse(**framework_task(result.message_id, custom_id=["here", "there"][int(result.message_id)]))

    assert matched(tasks, [framework_task(1), framework_task(0)], look_up) == (["0", "1"], 0)


def test_keys_in_another_order_make_no_difference():
    """A server may sort them; two tasks that differ in nothing else are alike."""
    forth = Task(url=URL, custom_id="forth", body={"a": 1, "b": {"c": 2, "d": [{"e": 3, "f": 4}]}})
    back = Task(url=OTHER_URL, custom_id="back", body={"b": {"d": [{"f": 4, "e": 3}], "c": 2}, "a": 1})
    exported = [local_task(0, forth), local_task(1, back)]
    exported[1]["body"] = exported[0]["body"]

    assert matched([forth, back], exported[::-1]) == (["0", "1"], 0)


def test_integer_keys_come_back_as_text():
    """JSON has no others."""
    biased = Task(url=URL, body={"logit_bias": {9: -100, 10: 1.5}})  # as text, 10 comes first

    assert matched([task(), biased], [framework_task(1, biased), framework_task(0)]) == (["0", "1"], 0)


@pytest.mark.parametrize("value", [(1, 2), {"b": {"d": 1, "c": 2}, "a": [{"f": 1, "e": 2}]}, 2**70, 1e22, "\u00e9"])
def test_a_result_has_the_digest_of_its_task(value):
    """Whatever JSON made of it, and in whatever order a server gives the keys back."""
    one = task(value)
    back = json.loads(json.dumps(framework_task(0, one), sort_keys=True))

    assert len(task_digest(one)) == 16
    assert task_digest(one) == result_digest(TaskResponse(**back))


@pytest.mark.parametrize("others", [(1, 1.0, True, "1"), ({}, [], None, ""), ([1, 2], [2, 1]), ({"a": {}}, {"a": []})])
def test_what_differs_in_json_has_digests_of_its_own(others):
    """Though Python may call it equal."""
    assert len({task_digest(task(value)) for value in others}) == len(others)


@pytest.mark.parametrize("value", ["\ud800", float("nan"), 10**400], ids=["surrogate", "nan", "int"])
def test_a_result_that_no_task_could_have_is_surplus(value):
    """A server may send what no task may hold."""
    stranger = TaskResponse(**{**framework_task(1), "source": {"value": value}})

    assert ResultList([task()]).match([stranger, TaskResponse(**framework_task(0))], no_look_up)[1] == 1


def test_tasks_alike_in_all_share_the_results_out():
    """Each gets one, and nothing is asked: they are interchangeable."""
    tasks = [task(custom_id="same")] * 3

    results, surplus = matched(tasks, [framework_task(i) for i in range(3)])

    assert sorted(results) == ["0", "1", "2"] and surplus == 0


@pytest.mark.parametrize("exported_task", [framework_task, local_task])
def test_custom_ids_may_be_absent_or_repeated(exported_task):
    """What is asked identifies the tasks as well."""
    tasks = [task("a", custom_id=None), task("b", custom_id=None), task("c", custom_id="x"), task("d", custom_id="x")]

    assert matched(tasks, [exported_task(i, tasks[i]) for i in (3, 1, 0, 2)]) == (["0", "1", "2", "3"], 0)


@pytest.mark.parametrize("exported_task", [framework_task, local_task])
def test_a_surplus_result_is_counted_and_dropped(exported_task):
    """A redelivered upload is run twice; or somebody else's task is in the batch."""
    tasks = [task("a"), task("b")]
    exported = [exported_task(0, tasks[0]), exported_task(1, tasks[1]), exported_task(2, tasks[1])]

    results, surplus = matched(tasks, [*exported, exported_task(3, task("stranger"))])

    assert results[0] == "0" and results[1] in ("1", "2") and surplus == 2


def test_of_two_results_the_completed_one_is_taken():
    """A task that failed in one of its runs has a result all the same."""
    failed, completed = framework_task(0, status="FAILED"), framework_task(1)

    assert matched([task()], [failed, completed]) == matched([task()], [completed, failed]) == (["1"], 1)


@pytest.mark.parametrize("status", ["PENDING", "PROCESSING"])
def test_unfinished_tasks_are_no_results(status):
    """They are neither given nor surplus."""
    assert matched([task("a"), task("b")], [framework_task(0, task("a"), status=status)]) == ([None, None], 0)


def test_a_failed_task_has_a_result():
    """Its error."""
    assert matched([task()], [framework_task(0, status="FAILED")]) == (["0"], 0)


def test_a_task_without_a_result_gets_none():
    """Not another's, though they are alike in body."""
    tasks = [task(custom_id="a"), task(custom_id="b")]

    assert matched(tasks, [local_task(1, tasks[1])]) == ([None, "1"], 0)


def test_a_result_that_can_not_be_asked_for_goes_to_a_task_that_is_left():
    """It was deleted since; the others are known."""
    tasks = [task(custom_id=name) for name in ("a", "b", "c")]

    def look_up(result):
        number = int(result.message_id)
        return result if number == 1 else TaskResponse(**framework_task(number, custom_id=tasks[number].custom_id))

    assert matched(tasks, [framework_task(i) for i in (1, 2, 0)], look_up) == (["0", "1", "2"], 0)


# ------------------------------------------------------------------------------------------- any tasks

some = st.sampled_from
any_task = st.builds(
    task,
    prompt=some(["hi", "there", 1, 1.5, True, None, {"1": 2}, {1: 2}]),
    custom_id=some([None, "a", "b"]),
    url=some([URL, OTHER_URL]),
    dataset=some([None, "d"]),
    source=some([None, {"row": 1}]),
)


def identity(one, *names):
    """What a server can tell of a task."""
    return repr([framework_task(0, one)[name] for name in ("body", "dataset", "source")]), *(
        getattr(one, name) for name in names
    )


def test_results_in_a_file_take_no_memory_however_many_tasks_are_alike():
    """As where one prompt is asked again and again: a million samples are not to be held at once."""
    alike = [task(custom_id=str(number)) for number in range(3000)]
    one = TaskResponse(**local_task(0, alike[0]))
    results = ((one.model_copy(update={"custom_id": same.custom_id}), b"{}") for same in alike)
    with closing(ResultFile(io.BytesIO())) as file:
        file.note(alike)
        tracemalloc.start()
        assert file.match(results, no_look_up) == (3000, 0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()

    assert peak < 100 * len(alike)


@given(st.lists(any_task, max_size=12), st.data())
@pytest.mark.parametrize("tells_all", [True, False], ids=["embedded server", "framework"])
def test_shuffled_results_always_go_to_their_own_tasks(tells_all, tasks, data):
    """Or to one that nobody could tell apart; each is used once, those of a second run are surplus."""
    names = ["custom_id", "url", "method"] if tells_all else ["custom_id"]
    twice = data.draw(st.lists(some(range(len(tasks))), unique=True)) if tasks else []
    runs = data.draw(st.permutations([*enumerate(range(len(tasks))), *enumerate(twice, len(tasks))]))
    task_of = dict(runs)
    exported = [(local_task if tells_all else framework_task)(run, tasks[index]) for run, index in runs]

    def look_up(result):
        assert not tells_all
        of = tasks[task_of[int(result.message_id)]]
        return TaskResponse(**framework_task(result.message_id, of, custom_id=of.custom_id))

    results, surplus = matched(tasks, exported, look_up)

    assert max(Counter(results).values(), default=0) <= 1 and surplus == len(twice)
    for one, run in zip(tasks, results):
        assert identity(one, *names) == identity(tasks[task_of[int(run)]], *names)


# ------------------------------------------------------------------------------------ through the client


@pytest.fixture
def collect(server):
    """Comes back to a batch of these tasks that ended with these results; gives what the client does."""

    def come_back(tasks, exported, monitor=None):
        server.answer("GET", "/health", {"status": "healthy"})
        server.answer("GET", "/api/v1/batches/b", batch(len(exported)))
        server.answer("GET", "/api/v1/batches/b/tasks/export", Answer(chunks=[export_line(exported)]))
        with SynthgenClient(server.url) as client:
            return client.monitor_batch(tasks, "b", show_progress=False, monitor=monitor)

    return come_back


#: Alike in body; at two URLs; integer keys; absent and repeated custom_ids.
MIXED = [
    task("same", custom_id="a"),
    task("same", custom_id="b"),
    task("other", custom_id=None),
    task("other", custom_id="c", url=OTHER_URL),
    Task(url=URL, body={"logit_bias": {50256: -100}}),
    Task(url=URL, body={"logit_bias": {50256: 100}}),
    task("repeated 1", custom_id="x"),
    task("repeated 2", custom_id="x"),
]
SHUFFLED = [7, 3, 0, 8, 5, 1, 4, 6, 2]


def test_the_frameworks_results_go_to_their_tasks(server, collect):
    """Without a custom_id in the export, in no order, and with one that belongs to nobody."""
    tasks = [*MIXED, task("stranger")]
    for number, one in enumerate(tasks):
        single = framework_task(number, one, custom_id=one.custom_id)
        server.answer("GET", f"/api/v1/tasks/{number}", single)

    results = collect(MIXED, [framework_task(number, tasks[number]) for number in SHUFFLED])

    assert [result.message_id for result in results] == [str(number) for number in range(8)]
    assert [result.custom_id for result in results] == [one.custom_id for one in MIXED]
    asked = {request.path for request in server.requests if "/api/v1/tasks/" in request.path}
    assert asked == {f"/api/v1/tasks/{number}" for number in range(4)}


def test_the_embedded_servers_results_go_to_their_tasks(server, collect):
    """Its export tells all there is to know; no single task is asked for."""
    tasks = [*MIXED, task("stranger")]

    results = collect(MIXED, [local_task(number, tasks[number]) for number in SHUFFLED])

    assert [result.message_id for result in results] == [str(number) for number in range(8)]
    assert [result.custom_id for result in results] == [one.custom_id for one in MIXED]
    assert not [request for request in server.requests if "/api/v1/tasks/" in request.path]


def test_a_surplus_is_noted(collect):
    """The batch was run twice in part, and paid for."""
    notes = []

    class Recorder(Monitor):
        def note(self, text):
            notes.append(text)

    collect([task()], [framework_task(0), framework_task(1)], Recorder())

    assert len(notes) == 1 and "1 more result" in notes[0]


def test_single_tasks_are_asked_for_side_by_side(server, collect):
    """Each answer waits until all are asked for; the monitor is told how many came."""
    tasks = [task(custom_id=str(number)) for number in range(4)]
    all_asked = threading.Barrier(4)

    def answer(request):
        all_asked.wait(DEADLINE)
        number = request.path.rpartition("/")[2]
        return framework_task(number, custom_id=number)

    class Recorder(Monitor):
        def download(self, received, total):
            downloads.append((received, total))

    downloads = []
    for number in range(4):
        server.answer("GET", f"/api/v1/tasks/{number}", answer)

    results = collect(tasks, [framework_task(number) for number in (3, 1, 0, 2)], Recorder())

    assert [result.message_id for result in results] == [result.custom_id for result in results] == list("0123")
    assert downloads == [(1, 4), (4, 4)] * 2


def test_a_result_deleted_since_is_no_error(server, collect):
    """The single task is not found; its result is there."""
    tasks = [task(custom_id="a"), task(custom_id="b")]
    server.answer("GET", "/api/v1/tasks/0", None)
    server.answer("GET", "/api/v1/tasks/1", framework_task(1, custom_id="b"))

    results = collect(tasks, [framework_task(1), framework_task(0)])

    assert [(result.message_id, result.custom_id) for result in results] == [("0", "a"), ("1", "b")]
