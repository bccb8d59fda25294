"""Every attack that was ever tried on the server and the engine, and what shows that it fails: a test, or why there is
none. The names are those under which the attacks were reported; docs/security.md has the limits.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

DOOR, HTTP, FUZZ = "serving/test_door.py", "serving/test_http.py", "serving/test_fuzz.py"
CONNECTIONS, STOPPING, RESULTS = "serving/test_connections.py", "serving/test_stopping.py", "serving/test_results.py"
ASYNC, BAD_INPUT, LOOP = "engine/test_async_engine.py", "engine/test_bad_input.py", "engine/test_loop.py"
HOSTILE, SHARES, WEIGHTS = "benchmarks/test_hostile.py", "scheduler/test_shares.py", "models/test_weights.py"
TOKENIZER, CPU, MUTATIONS = "engine/test_tokenizer.py", "kernels/test_cpu.py", "models/test_mutations.py"
TOO_LARGE = f"{DOOR}::TestSizes::test_what_is_too_large_is_refused_by_name"

SERIOUS = {
    "H1 a token beyond the embedding": [f"{TOKENIZER}::TestTokensThatTheModelLacks"],
    "H2 logit_bias": [TOO_LARGE, "engine/test_sampler.py::test_a_row_draws_the_same_alone_and_in_any_batch"],
    "H3 /tokenize": [TOO_LARGE, HOSTILE],
    "H4 idle connections": [
        f"{CONNECTIONS}::test_headers_that_do_not_come",
        f"{CONNECTIONS}::test_more_silent_connections_than_there_is_room_for",
        f"{CONNECTIONS}::test_open_files_are_as_many_as_allowed",
        f"{CONNECTIONS}::test_the_log_is_not_flooded",
        HOSTILE,
    ],
    "H5 answers of any size": [
        TOO_LARGE,
        f"{DOOR}::TestSizes::test_log_probabilities_of_all_together",
        f"{DOOR}::TestLargeAnswers",
        "engine/test_logprobs.py::test_places_are_no_work_for_the_collector",
        HOSTILE,
    ],
    "M1 DNS rebinding": [f"{DOOR}::TestBrowsers"],
    "M2 results by counting": [f"{RESULTS}::test_unknown", f"{RESULTS}::test_the_documents_example"],
    "M3 a form of another page": [f"{DOOR}::TestBrowsers::test_what_a_form_can_send"],
    "M4 a stuck step": [f"{DOOR}::TestEnds::test_a_step_that_does_not_end", f"{DOOR}::TestEnds::test_signals"],
    "M5 a queue without end": [
        f"{DOOR}::TestTurns",
        f"{SHARES}::test_a_newcomer_does_not_wait_for_others_blocks",
        f"{SHARES}::test_one_callers_prompts_do_not_make_a_step_long",
        f"{ASYNC}::TestEnds::test_what_has_ended_is_freed_at_once",
        HOSTILE,
    ],
    "M6 stop strings": [TOO_LARGE, "engine/test_detokenizer.py::TestStopStrings"],
    "M7 validation": [TOO_LARGE, f"{DOOR}::TestSizes::test_values_are_counted_without_reading_them", HOSTILE],
    "M8 rotary tables": ["models/test_long_context.py::test_tables_are_as_long_as_the_longest_sequence"],
    "M9 stale kernels": [
        f"{CPU}::test_a_damaged_file_is_not_run",
        f"{CPU}::test_a_changed_source_is_compiled_anew",
        f"{CPU}::test_without_a_place_to_keep_them_kernels_are_compiled",
    ],
    "M10 empty settings": [f"{DOOR}::TestSettings"],
    "M11 the prefix cache tells": [f"{DOOR}::TestKeys", f"{HTTP}::TestLimits::test_keys_that_are_wrong"],
    "M12 logits that are no numbers": [f"{DOOR}::TestEnds::test_logits_that_are_no_numbers_are_an_error"],
    "M13 clients that never read": [f"{CONNECTIONS}::test_a_client_that_never_reads"],
    "M14 bodies held back": [
        f"{DOOR}::TestSizes::test_bodies_of_all_together",
        f"{DOOR}::TestSizes::test_a_body_that_is_thrown_away_comes_no_faster",
        "serving/test_pools.py::test_of_a_request",
        HOSTILE,
    ],
    "M15 stop_token_ids": [
        TOO_LARGE,
        "engine/test_sampler.py::test_min_tokens_bans_stop_tokens_until_there_are_that_many",
    ],
}

LOW: dict[str, list[str] | str] = {
    "L1 chunks of one byte": "how long parsing them takes is h11's; at most 16 KiB are read at once (connections.py), "
    "so that others have their turn in between",
    "L4 two servers on one port": [f"{DOOR}::TestEnds::test_two_servers_on_one_port"],
    "L5 Ctrl-C at any line": [f"{LOOP}::test_ctrl_c_at_any_line_damages_nothing"],
    "L5b Ctrl-C while steps overlap": [f"{LOOP}::test_ctrl_c_at_any_line_damages_nothing"],
    "L6 a forked child": [f"{ASYNC}::TestShutdown::test_a_forked_child_is_told"],
    "L7 raw errors about a config": [MUTATIONS, f"{MUTATIONS}::test_a_deep_file"],
    "L8 a signal while it starts": [f"{DOOR}::TestEnds::test_signals"],
    "L9 a template without end": [f"{DOOR}::TestTemplates"],
    "L10 a panic": [f"{DOOR}::TestEnds::test_a_tokenizer_that_panics", f"{ASYNC}::TestErrors"],
    "L11 a forgotten engine": [f"{ASYNC}::TestShutdown::test_without_it_a_forgotten_engine_is_freed"],
    "L12 a client that half-closes": [f"{HTTP}::TestLeaving::test_half_closed_is_gone"],
    "L15 events about a long queue": [f"{DOOR}::test_an_event_lists_no_more_than_some"],
    "L16 one failed step": [
        f"{STOPPING}::TestStepsThatRaise",
        f"{ASYNC}::TestErrors::test_a_step_that_raises_is_tried_again",
    ],
}

HELD: dict[str, list[str] | str] = {
    "200 streaming clients, many of whom leave": ["serving/test_load.py"],
    "waves of short streams": ["serving/test_load.py", f"{ASYNC}::TestEnds::test_what_has_ended_is_freed_at_once"],
    "slow and never-reading clients beside others": [f"{CONNECTIONS}::test_a_client_that_never_reads"],
    "never-readers, closed each time": [f"{HTTP}::TestLeaving::test_what_is_left_is_freed"],
    "slow headers, silence, stuck bodies": [CONNECTIONS, f"{HTTP}::TestLimits::test_a_body_that_does_not_come"],
    "large and broken headers": [f"{HTTP}::TestBodySize::test_headers_without_end", f"{HTTP}::TestRandomBytes"],
    "bodies of 20 and 200 MB": [f"{HTTP}::TestBodySize"],
    "chunks of one byte without end": [f"{HTTP}::TestLimits::test_a_body_that_does_not_come"],
    "contradicting lengths and encodings": [f"{HTTP}::TestBodySize::test_strange_announcements"],
    "pipelining, old and other protocols": [f"{HTTP}::TestRandomBytes"],
    "wrong methods": [f"{HTTP}::TestBadRequests::test_paths_and_methods", FUZZ],
    "malformed JSON": [f"{HTTP}::TestBadRequests::test_bodies", f"{FUZZ}::test_bytes"],
    "random requests, valid and not": [FUZZ, f"{FUZZ}::test_any_json_in_any_field"],
    "path traversal": [f"{HTTP}::TestPages::test_files_outside_the_page_are_not_served"],
    "ways around the key": [f"{HTTP}::TestLimits::test_keys_that_are_wrong"],
    "the key in the log": "nothing logs headers or settings: uvicorn's access log is off, and no message holds a key",
    "forms of other pages": [
        f"{DOOR}::TestBrowsers::test_what_a_form_can_send",
        f"{DOOR}::TestBrowsers::test_a_foreign_page",
    ],
    "chat_template_kwargs": [f"{BAD_INPUT}::TestChat", f"{DOOR}::TestTemplates::test_the_same_text_as_without_a_child"],
    "malicious templates": [f"{DOOR}::TestTemplates"],
    "cardinality of /metrics": ["serving/test_events.py"],
    "a full store of results": [f"{RESULTS}::test_old_results_go", "serving/test_kept.py"],
    "ids of requests": [f"{RESULTS}::test_unknown"],
    "many readers of events": ["serving/test_events.py", f"{DOOR}::test_an_event_lists_no_more_than_some"],
    "signals in any order": [f"{STOPPING}::TestDraining", f"{STOPPING}::TestProcess::test_a_signal"],
    "signals while it starts": [f"{DOOR}::TestEnds::test_signals"],
    "kill -9 with a trace": ["engine/test_trace.py"],
    "a port that is taken": [f"{STOPPING}::TestProcess::test_a_port_that_is_taken_shows_before_the_model_is_loaded"],
    "a trace on a full disk": ["engine/test_trace.py"],
    "few open files": [f"{CONNECTIONS}::test_open_files_are_as_many_as_allowed", HOSTILE],
    "a home that is read-only": [f"{CPU}::test_without_a_place_to_keep_them_kernels_are_compiled"],
    "calls that raise within steps": ["engine/test_faults.py"],
    "the same under load": [f"{STOPPING}::TestStepsThatRaise::test_only_those_under_way_fail"],
    "Ctrl-C in generate": [f"{LOOP}::test_ctrl_c_at_any_line_damages_nothing"],
    "many threads": ["engine/test_engine_api.py::TestThreads"],
    "a fork": [f"{ASYNC}::TestShutdown::test_a_forked_child_is_told"],
    "thousands of short requests": ["engine/test_engine_api.py::TestGenerate::test_a_thousand_one_token_requests"],
    "engines made and deleted": [f"{ASYNC}::TestShutdown::test_without_it_a_forgotten_engine_is_freed"],
    "KV memory full of NaN": [f"{LOOP}::test_keys_that_are_no_numbers_spoil_no_block_for_the_next_owner"],
    "logits of every kind": ["engine/test_sampler.py::test_logits_of_any_magnitude", f"{BAD_INPUT}::TestFailingSteps"],
    "damaged safetensors": [WEIGHTS, MUTATIONS],
    "an index that leads outside": [f"{WEIGHTS}::test_a_useless_index"],
    "links, directories, pickles": [f"{WEIGHTS}::test_only_pickled_weights", f"{WEIGHTS}::test_a_git_lfs_pointer"],
    "strange configs": [MUTATIONS, "models/test_config.py::test_invalid", "models/test_contradictions.py"],
    "auto_map": ["models/test_config.py::test_code_beside_the_config_is_never_run"],
    "damaged tokenizers": [f"{TOKENIZER}::TestDamaged"],
    "long lists of end tokens": "they load in time in proportion to their number, and are looked up in a set",
    "eval, exec, pickle, shells": ["test_attacks.py::test_nothing_else_runs_what_it_reads"],
    "licences": ["tools/test_audit.py"],
    "known faults of dependencies": ["tools/test_audit.py"],
    "timing of the key": "compared with hmac.compare_digest, whose promise it is",
    "a clock that jumps": "time.time is used for the field `created` alone; everything else counts monotonic seconds",
}

ALL = {**SERIOUS, **LOW, **HELD}


@cache
def names_in(path: Path) -> frozenset[str]:
    """Tests of a file, those of classes behind the class's name."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            names |= {
                node.name,
                *(f"{node.name}::{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)),
            }
        elif isinstance(node, ast.FunctionDef):
            names.add(node.name)
    return frozenset(names)


@pytest.mark.parametrize("attack", ALL)
def test_something_shows_that_it_fails(attack: str) -> None:
    shown = ALL[attack]
    assert shown
    for test in [] if isinstance(shown, str) else shown:
        file, _, name = test.partition("::")
        assert (TESTS / file).is_file() and (not name or name in names_in(TESTS / file)), test


def test_none_is_left_out() -> None:
    assert [name.split()[0] for name in SERIOUS] == [f"H{i}" for i in range(1, 6)] + [f"M{i}" for i in range(1, 16)]
    low = [f"L{i}" for i in ("1", "4", "5", "5b", *range(6, 13), 15, 16)]
    assert [name.split()[0] for name in LOW] == low


def test_nothing_else_runs_what_it_reads() -> None:
    """Code comes from files that the user named as such, and from the compiler's own cache, whose files are checked."""
    runs = {"eval", "exec", "loads of pickle", "load of pickle", "system", "popen"}
    found = set()
    for path in (TESTS.parent / "mini_infer").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            call = node.func
            if isinstance(call, ast.Name) and call.id in runs:
                found.add((path.name, call.id))
            elif isinstance(call, ast.Attribute) and isinstance(call.value, ast.Name):
                name = f"{call.attr} of pickle" if call.value.id == "pickle" else call.attr
                if name in runs and call.value.id in ("pickle", "os"):
                    found.add((path.name, name))
            assert not any(keyword.arg == "shell" for keyword in node.keywords), path
    assert found == {("plugins.py", "exec"), ("registry.py", "exec"), ("cache.py", "loads of pickle")}
