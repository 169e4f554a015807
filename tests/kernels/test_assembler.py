"""Which ptxas Triton is told to take, and the mark that a faulty one leaves in machine code."""

from types import SimpleNamespace

import pytest
import torch

from fastslots.kernels.gpu import assembler
from fastslots.kernels.tools.registers import unwritten_registers

# From token_attention_fwd, bf16, 64 x 64, as Triton 3.6 assembled it: nothing writes UR15. Its sums were 3.9 times off.
FAULTY = """
        /*1550*/                   UMOV UR11, 0xc0000010 ;
        /*1560*/                   R2UR UR4, R14 ;
        /*1568*/                   R2UR UR5, R15 ;
        /*1580*/                   UIADD3 UR6, UP0, UR15, 0x20, URZ ;
        /*1590*/                   UIADD3.64 UR8, UR4, 0x7e, URZ ;
        /*15a0*/                   UIADD3.X UR7, UR15, -0x3ffffff0, URZ, UP0, !UPT ;
        /*15b0*/                   UMOV UR10, UR6 ;
        /*15d0*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8].tnspA.tnspB, R24 ;
"""


def test_reads_of_registers_that_nothing_has_written_are_found():
    assert [text.split(",")[0] for text in unwritten_registers(FAULTY)] == ["UIADD3 UR6", "UIADD3.X UR7"]
    sound = FAULTY.replace("/*1580*/", "/*1570*/ S2UR UR15, SR_CgaCtaId ;\n        /*1580*/")
    assert unwritten_registers(sound) == []
    # The second operand's descriptor is part of what a product reads.
    assert unwritten_registers(sound.replace("UMOV UR10, UR6", "UMOV UR20, UR6"))
    # On sm_100 a maximum over a warp writes a uniform register, and predicates are kept in one.
    assert unwritten_registers("/*19d0*/ CREDUX.MAX.F32 UR11, R11 ;\n/*1a40*/ MOV R4, UR11 ;") == []
    assert (
        unwritten_registers("/*0040*/ UP2UR UR7, UPR, URZ, 0x1 ;\n/*02c0*/ UISETP.NE.AND UP0, UPT, UR7, URZ, UPT ;")
        == []
    )


@pytest.fixture
def tools(monkeypatch):
    """Stand-ins for what Triton carries; setting one as its environment variable says takes its place."""
    carried = {90: SimpleNamespace(version="12.8", path="old"), 100: SimpleNamespace(version="12.9", path="new")}
    forgotten = []

    def get_ptxas(arch):
        named = assembler.os.environ.get(assembler.VARIABLE)
        return next((tool for tool in carried.values() if tool.path == named), carried[arch])

    version = SimpleNamespace(cache_clear=lambda: forgotten.append(True))
    monkeypatch.setattr(assembler, "compiler", SimpleNamespace(get_ptxas=get_ptxas, get_ptxas_version=version))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    # Set and removed by hand, so that the variable that ``choose`` sets is gone after the test.
    monkeypatch.setenv(assembler.VARIABLE, "")
    for function in (assembler.choose, assembler.why_not):
        function.cache_clear()
    yield SimpleNamespace(carried=carried, forgotten=forgotten)
    for function in (assembler.choose, assembler.why_not):
        function.cache_clear()


def test_the_newer_assembler_of_the_two_is_taken(tools):
    assert assembler.why_not("sm_90") is None
    assert assembler.os.environ[assembler.VARIABLE] == "new" and tools.forgotten == [True]


def test_a_sound_assembler_is_left_alone(tools):
    tools.carried[90].version = "13.4"
    assert assembler.why_not("sm_90") is None and not assembler.os.environ[assembler.VARIABLE]


def test_an_assembler_newer_than_the_driver_is_not_taken(tools, monkeypatch):
    """Products on sm_90 are then not ours, and the reason names the variable that mends it."""
    tools.carried[100].version = "13.1"
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert "ptxas 12.8 miscompiles" in assembler.why_not("sm_90") and "TRITON_PTXAS_PATH" in assembler.why_not("sm_90")
    assert assembler.why_not("sm_80") is None and not assembler.os.environ[assembler.VARIABLE]


def test_the_users_own_choice_stays(tools, monkeypatch):
    monkeypatch.setenv(assembler.VARIABLE, "old")
    assert "ptxas 12.8" in assembler.why_not("sm_90") and assembler.os.environ[assembler.VARIABLE] == "old"


def test_a_torch_without_cuda_compiles_with_the_newer_one(tools, monkeypatch):
    tools.carried[100].version = "13.1"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert assembler.why_not("sm_90") is None
