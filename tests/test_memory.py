"""The number of cache blocks that fit into memory."""

import subprocess
import sys

import pytest

from tokenmill import LLM
from tokenmill.backends.kind import CPU_DEFAULTS, GPU_DEFAULTS
from tokenmill.engine.tables import Tables
from tokenmill.errors import NotEnoughMemory
from tokenmill.host import available_bytes
from tokenmill.models.base import program_of
from tokenmill.runtime.assembly import context_weight, scheduler_of
from tokenmill.runtime.memory import (
    CACHE_BYTES,
    DEVICE_RESERVE,
    Demand,
    check_weights,
    count_blocks,
    count_device_blocks,
    size,
)
from tokenmill.wire.messages import EngineInfo

GIB = 1 << 30


def demand(**changes) -> Demand:
    values = {
        "block_bytes": 1 << 20,
        "step_bytes": 0,
        "tables": Tables.of((0,), 16, 512),
        "max_batch_size": 128,
        "max_total_tokens": 8192,
    }
    return Demand(**{**values, **changes})


def test_a_cache_takes_a_share_of_what_is_free_after_the_largest_step():
    assert count_blocks(demand(), GIB) == 512
    assert count_blocks(demand(step_bytes=GIB // 2), GIB) == 256


def test_without_a_limit_a_large_machine_is_not_filled():
    assert count_blocks(demand(), 100 * GIB) == CACHE_BYTES >> 20


def test_ranks_of_one_machine_share_the_cap():
    assert count_blocks(demand(max_total_tokens=128), 100 * GIB, ranks=4) == CACHE_BYTES >> 22


def test_one_sequence_of_full_length_may_exceed_the_cap():
    assert count_blocks(demand(max_total_tokens=131072), 100 * GIB) == 8192


def test_a_limit_covers_weights_step_and_cache():
    assert count_blocks(demand(step_bytes=GIB), 100 * GIB, weight_bytes=3 * GIB, limit=10 * GIB) == 6 * 1024


def test_a_limit_above_what_is_free_does_not_help():
    assert count_blocks(demand(), GIB, limit=10 * GIB) == 1024


def test_no_more_blocks_are_taken_than_all_slots_can_use():
    assert count_blocks(demand(max_batch_size=2, max_total_tokens=100), 100 * GIB) == 14


def test_a_wanted_length_is_worth_more_than_the_share():
    assert count_blocks(demand(wanted_tokens=600 * 16), GIB) == 600


def test_a_wanted_length_that_does_not_fit_is_refused_with_both_numbers_and_the_cure():
    with pytest.raises(NotEnoughMemory) as refused:
        count_blocks(demand(wanted_tokens=8192), GIB // 4)
    assert "8192 tokens needs 512.0 MiB, but 128.0 MiB are free" in str(refused.value)
    assert "--max-total-tokens" in str(refused.value)


def test_weights_over_the_limit_leave_nothing_and_say_so():
    with pytest.raises(NotEnoughMemory, match=r"0 B are left of the memory limit of 2\.0 GiB \(weights 3\.0 GiB"):
        count_blocks(demand(), 100 * GIB, weight_bytes=3 * GIB, limit=2 * GIB)


def test_a_machine_with_less_than_a_step_is_refused():
    with pytest.raises(NotEnoughMemory):
        count_blocks(demand(step_bytes=2 * GIB), GIB)


def test_a_gpus_memory_is_the_caches_but_for_the_step_and_a_little():
    blocks = count_device_blocks(demand(step_bytes=2 * GIB, max_total_tokens=131072), 40 * GIB)
    assert 0.98 < blocks * (1 << 20) / (38 * GIB - DEVICE_RESERVE) < 1


def test_a_gpus_limit_covers_weights_step_and_cache():
    asked = demand(step_bytes=GIB, claimed_bytes=GIB // 2, max_total_tokens=131072)
    assert count_device_blocks(asked, 70 * GIB, weight_bytes=3 * GIB, limit=10 * GIB) == 6 * 1024


def test_what_a_step_has_taken_on_a_gpu_is_not_left_free_once_more():
    rest = [demand(step_bytes=3 * GIB, claimed_bytes=taken * GIB, max_total_tokens=131072) for taken in (0, 2)]
    less, more = (count_device_blocks(asked, 40 * GIB) for asked in rest)
    assert more - less == 2 * 1024


def test_a_gpu_without_room_for_a_sequence_is_refused_with_the_cure():
    with pytest.raises(NotEnoughMemory, match=r"8192 tokens needs 512\.0 MiB, but 0 B are .* --cuda-memory-fraction"):
        count_device_blocks(demand(step_bytes=GIB, wanted_tokens=8192), GIB)


def tree(tmp_path, files):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(tmp_path)


def test_the_tightest_enclosing_cgroup_counts_and_its_droppable_file_pages_do_not(tmp_path):
    root = tree(tmp_path, {
        "proc/self/cgroup": "0::/pod/box\n",
        "sys/fs/cgroup/pod/memory.max": "3000",
        "sys/fs/cgroup/pod/memory.current": "2500",
        "sys/fs/cgroup/pod/memory.stat": "anon 1\ninactive_file 700\n",
        "sys/fs/cgroup/pod/box/memory.max": "max\n",
        "sys/fs/cgroup/pod/box/memory.current": "9",
        "sys/fs/cgroup/pod/box/memory.stat": "inactive_file 0\n",
    })  # fmt: skip
    assert available_bytes(root) == 3000 - (2500 - 700)


def test_cgroups_of_the_first_version_are_understood_and_their_no_limit_is_none(tmp_path):
    limits = {
        "proc/self/cgroup": "4:memory:/box\n0::/\n",
        "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "5000",
        "sys/fs/cgroup/memory/box/memory.usage_in_bytes": "1000",
        "sys/fs/cgroup/memory/box/memory.stat": "total_inactive_file 10\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096),
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000",
        "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 10\n",
    }
    assert available_bytes(tree(tmp_path, limits)) == 5000 - 990


def test_without_cgroups_the_machine_counts(tmp_path):
    assert available_bytes(str(tmp_path)) > 1 << 20


def test_sizes_read_well():
    assert [size(n) for n in (0, 1023, 1536, 5 << 20, 3 << 29)] == ["0 B", "1023 B", "1.5 KiB", "5.0 MiB", "1.5 GiB"]


def test_weights_that_cannot_fit_are_refused_before_they_are_read():
    check_weights(GIB, GIB)
    with pytest.raises(NotEnoughMemory, match=r"need 2\.0 GiB, but 1\.0 GiB are free"):
        check_weights(2 * GIB, GIB)
    with pytest.raises(NotEnoughMemory, match=r"need 2\.0 GiB, but 1\.0 GiB are allowed"):
        check_weights(2 * GIB, 4 * GIB, limit=GIB)


def test_an_8bs_attention_is_as_dear_as_its_products_at_14k_tokens():
    config = {
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072, "rope_theta": 500000.0, "tie_word_embeddings": False,
    }  # fmt: skip
    assert 13_000 < context_weight(program_of(config)) < 14_000
    windowed = config | {"model_type": "mistral", "sliding_window": 4096}
    assert context_weight(program_of(windowed)) == 0


@pytest.mark.parametrize("defaults, chunk", [(CPU_DEFAULTS, 128), (GPU_DEFAULTS, 2048)])
def test_pieces_of_long_prompts_suit_the_device_and_are_weighed_on_each(defaults, chunk):
    config = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 100, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 1024, "rope_theta": 1e4, "tie_word_embeddings": False,
    }  # fmt: skip
    program = program_of(config)
    info = EngineInfo("m", "float32", "cpu", "cpu", 64, 16, 100, 1023, 1024, 512, 8)
    limits = scheduler_of(info, defaults, program).limits
    assert (limits.max_chunk, limits.context_weight) == (chunk, context_weight(program))
    assert scheduler_of(info, defaults).limits.context_weight == 0


def test_limits_that_memory_cannot_hold_are_refused_with_the_cure(embedded_model, monkeypatch):
    def full(*words):
        raise MemoryError("Unable to allocate 47.7 GiB")

    monkeypatch.setattr("tokenmill.runtime.assembly.make_backend", full)
    with pytest.raises(NotEnoughMemory, match=r"128 requests of 8192 tokens \(Unable .*\)\. Give a smaller"):
        LLM(str(embedded_model))


@pytest.mark.parametrize("letter, name", [("v", "VmSize"), ("d", "VmData")])
def test_limits_of_this_process_leave_what_it_has_not_taken(letter, name):
    code = (
        "from tokenmill.host import available_bytes\nfree = available_bytes()\n"
        f"taken = next(int(x.split()[1]) for x in open('/proc/self/status') if x.startswith('{name}'))\n"
        "print((2_000_000 - taken) * 1024 - free)"
    )
    command = ["bash", "-c", f'ulimit -{letter} 2000000; exec "$0" -c "$1"', sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert abs(int(done.stdout)) < 8 << 20  # allocated between the two measurements
