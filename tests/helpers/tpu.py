"""What tests that compile for TPUs share."""

import platform
import sys

import pytest

# The test extra brings libtpu wherever there is a build of it; were it missing there, these tests fail.
needs_libtpu = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="libtpu has no build for this machine"
)
