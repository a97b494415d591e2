"""Questions to another process: answers, deaths, silence."""

from __future__ import annotations

import os
import sys
import time

import pytest

from wandapp_kernels.backends import child as child_module
from wandapp_kernels.backends.child import Child, ChildError

# Answers its own number and what was asked, or does what it is told.
SCRIPT = """
import json, os, sys, time
for line in sys.stdin:
    question = json.loads(line)
    do = question["do"]
    if do == "die":
        print("the last words", file=sys.stderr, flush=True)
        os.abort()
    if do == "be killed":
        os.kill(os.getpid(), 9)
    if do == "close":
        os.close(1)
        time.sleep(60)
    if do == "fail":
        sys.exit(3)
    if do == "leave":
        sys.exit(0)
    if do == "hang":
        time.sleep(60)
    if do == "babble":
        print("what?", flush=True)
        continue
    print(json.dumps({"process": os.getpid(), "ends": do == "end", "question": question}), flush=True)
    if do == "end":
        time.sleep(0.2)
        os.abort()
    if do == "answer and go":
        sys.exit(0)
"""


@pytest.fixture
def child():
    one = Child([sys.executable, "-c", SCRIPT], seconds=20)
    yield one
    one.close()


def running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_one_process_answers_many_questions(child):
    answers = [child.ask({"do": "answer", "number": number}) for number in range(20)]
    assert [answer["question"]["number"] for answer in answers] == list(range(20))
    assert len({answer["process"] for answer in answers}) == 1 and answers[0]["process"] != os.getpid()
    child.close()
    assert not running(answers[0]["process"])
    assert child.ask({"do": "answer"})["process"] != answers[0]["process"]


@pytest.mark.parametrize(
    ("do", "words"),
    [
        ("die", r"died \(signal 6\): the last words"),
        ("fail", r"died \(status 3\)$"),
        ("leave", "ended without an answer"),
        ("babble", "cannot be read: what"),
    ],
)
def test_no_answer_is_an_error_and_the_next_question_a_new_process(child, do, words):
    before = child.ask({"do": "answer"})["process"]
    with pytest.raises(ChildError, match=words) as raised:
        child.ask({"do": do})
    assert raised.value.lasting
    after = child.ask({"do": "answer"})
    assert after["process"] != before and after["question"] == {"do": "answer"}


def test_one_that_was_killed_from_outside_is_no_lasting_reason(child):
    with pytest.raises(ChildError, match=r"died \(signal 9\)") as raised:
        child.ask({"do": "be killed"})
    assert not raised.value.lasting


def test_a_closed_output_without_an_end_is_an_error(child, monkeypatch):
    monkeypatch.setattr(child_module, "_END_SECONDS", 0.5)
    before = child.ask({"do": "answer"})["process"]
    with pytest.raises(ChildError, match="closed its output and did not end"):
        child.ask({"do": "close"})
    assert not running(before)
    assert child.ask({"do": "answer"})["process"] != before


def test_silence_ends_the_process():
    child = Child([sys.executable, "-c", SCRIPT], seconds=1)
    before = child.ask({"do": "answer"})["process"]
    began = time.monotonic()
    with pytest.raises(ChildError, match="no answer within 1 seconds"):
        child.ask({"do": "hang"})
    assert time.monotonic() - began < 10
    assert not running(before)
    assert child.ask({"do": "answer"})["process"] != before
    child.close()


def test_one_that_left_between_questions_is_started_again(child):
    before = child.ask({"do": "answer and go"})["process"]
    assert child.ask({"do": "answer"})["process"] != before


def test_how_it_ends_after_its_last_answer_is_nobody_s_business(child):
    before = child.ask({"do": "end"})["process"]
    assert not running(before)
    assert child.ask({"do": "answer"})["process"] != before


def test_a_command_that_is_not_there_is_no_lasting_reason():
    with pytest.raises(ChildError, match="cannot be started") as raised:
        Child(["/no/such/program"]).ask({})
    assert not raised.value.lasting


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_asks_a_process_of_its_own(child):
    mine = child.ask({"do": "answer"})["process"]
    fork = os.fork()
    if fork == 0:
        other = child.ask({"do": "answer"})["process"]
        child.close()
        os._exit(0 if other != mine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) == 0
    assert child.ask({"do": "answer"})["process"] == mine


def test_it_ends_with_the_process_that_asked():
    script = (
        "import sys; from wandapp_kernels.backends.child import Child\n"
        f"print(Child([sys.executable, '-c', {SCRIPT!r}]).ask({{'do': 'answer'}})['process'])"
    )
    import subprocess

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not running(int(done.stdout))
