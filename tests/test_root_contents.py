"""What a root notices of its own contents, and when: at once, or before a block uses a mask that it could influence."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from block_models import BLOCKS, Block, Blocks, Run, compile_block, compiled_blocks, contents_of
from graphs import DIM, Attention
from models import DEVICE, DTYPE, OPTIONS, denoise, noise, prompt, tiny_wan
from torch import Tensor, nn

from lite_compile import block_order
from lite_compile.clock import GENERATION, STEP
from lite_compile.layer_state import layer_states
from lite_compile.module_contents import ModuleContents
from lite_compile.root_clock import root_of

ALL, NONE = [True] * BLOCKS, [False] * BLOCKS


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many modules were looked through, each time that it was done."""
    counts: list[int] = []
    unchanged = ModuleContents.unchanged

    def count(contents: ModuleContents) -> bool:
        counts.append(len(contents._modules))
        return unchanged(contents)

    monkeypatch.setattr(ModuleContents, "unchanged", count)
    return counts


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of how many blocks it was asked what they check, each time that it was."""
    counts: list[int] = []
    find = block_order.checked_parts

    def count(module: nn.Module, steps: Any) -> list[nn.Module]:
        counts.append(len(steps))
        return find(module, steps)

    monkeypatch.setattr(block_order, "checked_parts", count)
    return counts


def in_order(make: Callable[[], nn.Module] = Block, **options: Any) -> tuple[Blocks, Run]:
    """A model in the middle of a generation, the order of whose blocks is known."""
    model = compiled_blocks(make, **options)
    run = Run(model)
    for _ in range(4):
        run.step()
    assert run.step() == ALL
    assert contents_of(model)._in_order
    return model, run


def checked(model: nn.Module) -> set[str]:
    """Names of the parts of a model that its blocks check, as found last."""
    names = {id(part): name for name, part in model.named_modules()}
    order = contents_of(model)._order
    assert order is not None
    return {names[id(reference())] for reference in order.rest._without}


def write(module: nn.Module) -> None:
    with torch.no_grad():
        next(module.parameters()).mul_(-1)


def test_once_the_order_is_known_blocks_are_not_looked_through(looked: list[int]) -> None:
    model, run = in_order()
    looked.clear()
    for _ in range(3):
        assert run.step() == ALL
    assert looked == [4] * 3  # the model itself, its head, its last norm, and the list that holds the blocks
    assert len(list(model.modules())) == 4 + 7 * BLOCKS
    assert checked(model) == {f"blocks.{n}" for n in range(BLOCKS)}


def test_the_order_is_known_after_three_completed_calls_that_had_it(looked: list[int]) -> None:
    model = compiled_blocks()
    run = Run(model)
    run.step()  # is over before its hooks can tell
    for _ in range(3):
        run.step()
        assert 4 not in looked
    run.step()
    assert looked[-1] == 4


def test_another_order_takes_the_place_of_one_that_is_known(looked: list[int]) -> None:
    model, run = in_order()
    model.order = [0, 1, 3]
    for _ in range(3):
        run.step()
    looked.clear()
    assert run.step() == [True] * 3
    assert looked == [4 + 7]  # and the block that does not run, with what is in it
    write(model.blocks[2].out)
    assert run.step() == [False] * 3
    assert run.step() == [True] * 3


def test_calls_in_turns_of_two_orders_are_not_learnt_anew_each_time(judged: list[int]) -> None:
    model = compiled_blocks()
    run = Run(model)
    for other in (2, 3):
        for step in range(9):
            model.order = [0, 1, 2, 3] if step % other else [0, 1, 3]
            run.step()
    assert judged == []
    model.order = [0, 1, 2, 3]
    for _ in range(3):
        run.step()
    assert judged == [4]
    for step in range(10):
        model.order = [0, 1, 2, 3] if step % 3 else [0, 1, 3]
        uses = run.step()
        assert uses.count(True) >= 3
    assert judged == [4]  # two in a row of the order that is known already


CHANGES: dict[str, tuple[Callable[[Blocks], object], list[bool], list[bool]]] = {
    "head": (lambda m: write(m.head), NONE, ALL),
    "norm_out": (lambda m: write(m.norm_out), NONE, ALL),
    "block 0": (lambda m: write(m.blocks[0].out), NONE, ALL),
    "block 2": (lambda m: write(m.blocks[2].attn.to_v), [True, True, False, False], NONE),
    "last block": (lambda m: write(m.blocks[3].out), [True, True, True, False], NONE),
    "parameter replaced": (
        lambda m: setattr(m.blocks[1].out, "weight", nn.Parameter(m.blocks[1].out.weight.detach().clone())),
        [True, False, False, False],
        NONE,
    ),
    "buffer added to the root": (lambda m: m.register_buffer("new", torch.zeros(1)), NONE, ALL),
    "module of a block replaced": (lambda m: setattr(m.blocks[1], "act", nn.GELU()), [True, False, False, False], NONE),
    "adapter that shares the weight": (lambda m: _adapt(m.blocks[1].attn), [True, False, False, False], NONE),
    "block replaced": (lambda m: m.blocks.__setitem__(1, _new_block()), NONE, ALL),
    "blocks exchanged": (lambda m: m.blocks.__init__([m.blocks[n] for n in (1, 0, 2, 3)]), NONE, ALL),
}


@pytest.mark.parametrize(("change", "now", "then"), CHANGES.values(), ids=CHANGES.keys())
def test_no_mask_is_used_that_a_change_could_influence(
    change: Callable[[Blocks], object], now: list[bool], then: list[bool]
) -> None:
    """`now` and `then`: which blocks use masks in the call after the change and in the one after that."""
    model, run = in_order()
    change(model)
    assert run.step() == now
    assert run.step() == then
    assert run.step() == ALL
    for _ in range(2):
        run.step()
    assert contents_of(model)._in_order


class Adapted(nn.Linear):
    """A linear layer with the weight of another one, and a product of two small matrices."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(DIM, DIM)
        self.weight, self.bias = linear.weight, linear.bias
        self.down, self.up = nn.Parameter(linear.weight[:1] * 0.5), nn.Parameter(linear.weight[:, :1] * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


def _adapt(attn: Any) -> None:
    attn.to_q = Adapted(attn.to_q)


def _new_block() -> Block:
    block = Block().to(DEVICE, DTYPE).eval()
    compile_block(block)
    return block


def test_what_changes_before_the_first_block_asks_begins_a_generation_in_the_same_call() -> None:
    """As a LoRA that is loaded between two generations: it costs no call."""
    model, run = in_order()
    clock = layer_states(model)[0].clock
    generation = int(clock[GENERATION])
    for block in model.blocks:
        _adapt(block.attn)
    assert run.step() == NONE
    assert int(clock[GENERATION]) == generation + 1
    assert int(clock[STEP]) == 0
    assert run.step() == ALL
    assert int(clock[GENERATION]) == generation + 1
    assert int(clock[STEP]) == 1


def test_blocks_that_are_left_out_once_cost_no_mask(looked: list[int]) -> None:
    model, run = in_order()
    model.order = [0, 2, 3]
    looked.clear()
    assert run.step() == [True] * 3
    everything = len(list(model.modules()))
    assert looked == [4, everything]
    model.order = [0, 1, 2, 3]
    assert run.step() == ALL
    assert looked == [4, everything, everything]
    assert run.step() == ALL
    assert looked == [4, everything, everything, 4]


@pytest.mark.parametrize("left_out", [1, 3])
def test_what_changes_in_a_block_that_is_left_out_is_noticed(left_out: int) -> None:
    model, run = in_order()
    write(model.blocks[left_out].out)
    model.order.remove(left_out)
    uses = run.step()
    assert uses == [place < left_out for place in range(3)]  # nothing asks after the last block
    model.order = [0, 1, 2, 3]
    assert run.step() == NONE
    assert run.step() == ALL


def test_what_changes_in_a_block_that_runs_uncompiled_is_noticed() -> None:
    model, run = in_order()
    write(model.blocks[3].out)
    compiled, model.blocks[3]._compiled_call_impl = model.blocks[3]._compiled_call_impl, None
    assert run.step() == [True] * 3  # what has run cannot depend on it
    model.blocks[3]._compiled_call_impl = compiled
    assert run.step() == NONE
    assert run.step() == ALL


def test_blocks_that_run_twice_or_in_another_order_are_out_of_order(looked: list[int]) -> None:
    model, run = in_order()
    everything = len(list(model.modules()))
    for order in ([0, 1, 1, 2, 3], [0, 2, 1, 3], [0, 1, 2, 3, 0]):
        model.order = order
        looked.clear()
        run.step()
        assert looked == [4, everything]
        model.order = [0, 1, 2, 3]
        for _ in range(2):
            run.step()
        assert looked == [4, everything, everything, 4]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_a_call_that_broke_off_everything_is_looked_through(error: type[BaseException]) -> None:
    model, run = in_order()

    def fail() -> None:
        raise error

    model.before[2] = fail
    with pytest.raises(error):
        run.step()
    write(model.blocks[3].out)
    model.before.clear()
    assert run.step() == NONE
    assert run.step() == ALL


def test_a_call_that_broke_off_teaches_no_order() -> None:
    model = compiled_blocks()
    run = Run(model)
    run.step()

    def fail() -> None:
        raise RuntimeError

    model.before[4] = fail
    for _ in range(3):
        with pytest.raises(RuntimeError):
            run.step()
    assert contents_of(model)._order is None
    model.before.clear()
    for _ in range(3):
        run.step()
    assert contents_of(model)._order is not None


def test_tensors_shared_with_the_head_are_looked_at_when_a_call_begins() -> None:
    """The head runs before any block checks them."""
    model = compiled_blocks()
    model.blocks[2].out.weight = model.head.weight
    run = Run(model)
    for _ in range(5):
        run.step()
    assert checked(model) == {"blocks.0", "blocks.1", "blocks.2.attn", "blocks.3"}
    write(model.blocks[2].out)
    assert run.step() == NONE
    assert run.step() == ALL
    write(model.blocks[0].out)  # which nothing but block 0 runs, so that its check comes early enough
    assert run.step() == NONE
    assert run.step() == ALL


def test_modules_that_are_held_twice_are_looked_at_when_a_call_begins() -> None:
    model = compiled_blocks()
    model.late = model.blocks[3].out
    model.blocks[1] = model.blocks[2]
    run = Run(model)
    for _ in range(5):
        run.step()
    assert checked(model) == {"blocks.0", "blocks.3.attn"}
    for module in (model.late, model.blocks[1]):
        write(module)
        assert not any(run.step())
        run.step()


class Counting(Block):
    """Has a buffer that its forward does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.out.register_buffer("unused", torch.zeros(1))


def test_a_part_with_a_tensor_that_the_graph_does_not_take_is_looked_at() -> None:
    model, run = in_order(Counting)
    assert checked(model) == {f"blocks.{n}.attn" for n in range(BLOCKS)}
    model.blocks[2].out.unused.add_(1)
    assert run.step() == NONE


class Broken(Block):
    """Its graph breaks beside attention, and the other graph uses a module of the part that this one takes whole."""

    def __init__(self, attention_first: bool) -> None:
        super().__init__()
        self.attn.act, self.attention_first = nn.SiLU(), attention_first

    def forward(self, x: Tensor) -> Tensor:
        a = self.attn(x) if self.attention_first else self.attn.act(x)
        torch._dynamo.graph_break()
        return x + self.out(self.attn.act(a) if self.attention_first else self.attn(a))


@pytest.mark.parametrize("attention_first", [True, False])
def test_blocks_whose_graphs_break_are_looked_through(attention_first: bool, judged: list[int]) -> None:
    """A graph that is not all of a forward does not guard what the rest of it uses."""
    model = compiled_blocks(partial(Broken, attention_first))
    run = Run(model)
    for _ in range(6):
        uses = run.step()
    assert uses == ALL
    assert contents_of(model)._order is None
    assert judged == [4]  # once
    model.blocks[2].attn.act = nn.GELU()
    assert run.step() == NONE


class Growing(nn.Module):
    """Its graph ends with attention, and something that is no graph may follow."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.more = Attention(), False
        self.attn.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(x)
        if self.more:
            torch._dynamo.graph_break()
            x = self.attn.act(x)
        return x


def test_another_graph_of_the_same_text_is_out_of_order() -> None:
    model, run = in_order(Growing)
    assert checked(model) == {f"blocks.{n}" for n in range(BLOCKS)}
    for block in model.blocks:
        block.more = True
    assert run.step() == ALL
    model.blocks[1].attn.act = nn.GELU()
    assert run.step() == NONE


class Inner(Block):
    """Compiles a function of its own rather than its forward, which uses a module of what that takes whole."""

    def __init__(self) -> None:
        super().__init__()
        self.attn.act = nn.SiLU()
        self.attend = torch.compile(self.attend, backend="liteattention", fullgraph=True, options=OPTIONS)

    def attend(self, x: Tensor) -> Tensor:
        out: Tensor = self.attn(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.attn.act(self.attend(x)))


def test_blocks_of_which_a_function_is_compiled_are_looked_through() -> None:
    model = Blocks(Inner).to(DEVICE, DTYPE).eval()
    run = Run(model)
    for _ in range(5):
        uses = run.step()
    assert uses == ALL
    assert contents_of(model)._order is None
    model.blocks[2].attn.act = nn.GELU()
    assert run.step() == NONE


@pytest.mark.parametrize("way", ["module", "forward", "attention alone"])
def test_other_ways_to_compile_a_block(way: str) -> None:
    options: dict[str, Any] = {"backend": "liteattention", "fullgraph": True, "options": OPTIONS}
    model = Blocks().to(DEVICE, DTYPE).eval()
    for number, block in enumerate(model.blocks):
        if way == "module":
            model.blocks[number] = torch.compile(block, **options)
        elif way == "forward":
            block.forward = torch.compile(block.forward, **options)
        else:
            block.attn = torch.compile(block.attn, **options)
    run = Run(model)
    for _ in range(5):
        uses = run.step()
    assert uses == ALL
    tail = {"module": "._orig_mod", "forward": "", "attention alone": ".attn._orig_mod"}[way]
    assert checked(model) == {f"blocks.{n}{tail}" for n in range(BLOCKS)}
    write(model.blocks[2].attn.to_q)
    assert run.step() == [True, True, False, False]
    assert run.step() == NONE


def test_what_changes_in_the_middle_of_a_call_is_noticed() -> None:
    model, run = in_order()
    for place, change, uses in (
        (2, "head", [ALL, NONE, ALL]),  # ran as it was: the next call begins with the other one
        (3, "block 1", [ALL, NONE, ALL]),  # not before block 1 asks, which makes the next call's masks of no use
        (1, "block 2", [[True, True, False, False], NONE, ALL]),
        (0, "block 0", [NONE, ALL, ALL]),
    ):
        part = model.head if change == "head" else model.blocks[int(change[-1])].out

        def act(part: nn.Module = part) -> None:
            write(part)
            model.before.clear()

        model.before[place] = act
        found = [run.step() for _ in range(3)]
        if change == "block 1":
            uses = [ALL, [True, False, False, False], NONE]
        assert found == uses, change
        for _ in range(3):
            run.step()
        assert contents_of(model)._in_order


@pytest.mark.parametrize("place", [-1, 0])
def test_a_call_in_which_old_and_new_parts_met_leaves_no_mask(place: int) -> None:
    """The first block asks after the head was written to: before it ran or after, nobody knows."""
    model, run = in_order()

    def act() -> None:
        write(model.head)
        write(model.blocks[0].out)
        model.before.clear()

    model.before[place] = act
    assert run.step() == NONE
    assert run.step() == NONE
    assert run.step() == ALL


def test_a_first_block_that_ran_uncompiled_before_it_changed_leaves_no_mask() -> None:
    model, run = in_order()
    block = model.blocks[0]
    compiled, block._compiled_call_impl = block._compiled_call_impl, None

    def act() -> None:
        write(block.out)
        block._compiled_call_impl = compiled
        model.before.clear()

    model.before[1] = act
    assert run.step() == NONE[1:]
    assert run.step() == NONE
    assert run.step() == ALL


def test_a_block_that_changes_and_runs_again_in_one_call_ends_the_use_of_masks() -> None:
    model, run = in_order()

    def act() -> None:
        write(model.blocks[0].out)
        model.before.clear()

    model.order, model.before[2] = [0, 1, 0, 2, 3], act
    assert run.step() == [True, True, False, False, False]
    model.order = [0, 1, 2, 3]
    assert run.step() == NONE
    assert run.step() == ALL


def test_what_changes_in_the_call_from_which_the_order_is_learnt_is_noticed() -> None:
    model = compiled_blocks()
    run = Run(model)
    for _ in range(3):
        run.step()
    model.before[4] = lambda: write(model.head)
    assert run.step() == ALL
    model.before.clear()
    assert run.step() == NONE


def test_a_root_that_calls_itself_is_not_followed() -> None:
    """The end of the inner call hides that of the outer one, of which more may run."""
    model, run = in_order()
    inner = Run(model, 1)

    def call_itself() -> None:
        model.before.clear()
        inner.step()
        model.before[4] = lambda: write(model.blocks[3].out)

    model.before[2] = call_itself
    run.step()
    model.before.clear()
    assert not contents_of(model)._in_order
    assert run.step() == NONE


def test_calls_of_other_threads_are_not_followed() -> None:
    model, run = in_order()
    other = Run(model)

    def call_elsewhere() -> None:
        model.before.clear()
        thread = threading.Thread(target=other.step)
        thread.start()
        thread.join()

    model.before[2] = call_elsewhere
    run.step()
    write(model.blocks[3].out)
    assert run.step() == NONE


def test_calls_without_a_clock_are_not_followed() -> None:
    model, run = in_order()
    write(model.blocks[3].out)
    with torch.no_grad():
        model(run.latents, torch.ones(1, 1, 1, device=DEVICE))  # nothing that a timestep looks like
    assert run.step() == NONE


def test_two_roots_that_share_blocks() -> None:
    one, run = in_order()
    other = Blocks().to(DEVICE, DTYPE).eval()
    other.blocks[3] = one.blocks[3]
    for number in range(3):
        compile_block(other.blocks[number])
    second = Run(other, 1)
    for _ in range(5):
        second.step()
    assert run.step() == [True, True, True, False]  # block 3 has followed the other clock
    for _ in range(3):
        assert run.step() == ALL
    write(one.blocks[3].out)
    second.step()
    assert run.step() == NONE  # though block 3 was found as it is now by the other root


def test_a_changed_block_that_another_root_runs_in_the_middle_of_a_call_ends_the_use_of_masks() -> None:
    model, run = in_order()
    other = Blocks().to(DEVICE, DTYPE).eval()
    other.blocks[0] = model.blocks[3]
    second = Run(other, 1)
    second.step()  # from now on it has hooks of its own
    for _ in range(4):
        run.step()
    assert contents_of(model)._in_order

    def act() -> None:
        model.before.clear()
        second.step()

    model.before[1] = act
    write(model.blocks[3].out)
    assert run.step() == [True, False, *NONE[1:]]  # block 0, block 3 for the other root, and blocks 1 to 3
    assert run.step() == NONE
    assert run.step() == ALL


def test_nothing_is_kept_alive() -> None:
    model, run = in_order()
    order = contents_of(model)._order
    assert order is not None
    block, weight = weakref.ref(model.blocks[2]), weakref.ref(model.blocks[2].out.weight)
    freed, clock = weakref.ref(model), weakref.ref(layer_states(model)[0].clock)
    del model.blocks[2]
    torch._dynamo.reset()
    gc.collect()
    assert block() is None
    assert weight() is None
    assert order.gone
    del model, run
    gc.collect()
    assert freed() is None
    assert clock() is None


def test_bindings_that_are_gone_make_an_order_of_no_use(looked: list[int]) -> None:
    """What ran meanwhile ran outside of the calls of the root."""
    model, run = in_order()
    order = contents_of(model)._order
    assert order is not None
    write(model.blocks[3].out)
    with torch.no_grad():
        model.blocks[3](run.latents)  # by itself: another binding takes the place of the one that it had
    assert order.gone
    looked.clear()
    assert run.step() == NONE
    assert looked[0] == len(list(model.modules()))


def test_scripted_parts_of_a_root() -> None:
    model = compiled_blocks()
    model.head = torch.jit.trace(model.head, torch.zeros(1, DIM, device=DEVICE, dtype=DTYPE))
    run = Run(model)
    for _ in range(5):
        uses = run.step()
    assert uses == ALL
    assert checked(model) == {f"blocks.{n}" for n in range(BLOCKS)}
    write(model.head)
    assert run.step() == NONE


def test_a_wan_transformer() -> None:
    model = tiny_wan(layers=3)
    model.compile_repeated_blocks(backend="liteattention", fullgraph=True, options=OPTIONS)
    denoise(model, noise(0), [prompt(0), prompt(1)], 3)
    assert checked(model) == {"blocks.0", "blocks.1", "blocks.2"}


def test_roots_go_without_a_collection_of_garbage() -> None:
    """States are large, and cycles would keep them for a while."""
    model = in_order()[0]
    freed = weakref.ref(root_of(model))
    gc.collect()
    gc.disable()
    try:
        model._forward_pre_hooks.clear()
        model._forward_hooks.clear()
        assert freed() is None
    finally:
        gc.enable()
