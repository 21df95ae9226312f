"""What `make sanitize` preloads to show ThreadSanitizer libgomp's fork and join hides no race."""

import shutil
import subprocess
from pathlib import Path

import pytest

PRELOAD = Path(__file__).parents[1] / "guard_pages" / "tsan_openmp.c"
PROGRAM = """
int before, shared;
int main(int count, char**) {
  for (int i = 0; i < 100; ++i) {
    before = i;  // before the region: no race
#pragma omp parallel num_threads(2)
    { volatile int seen = before; (void)seen; if (count > 1) ++shared; }
  }
}
"""


@pytest.mark.skipif(not (shutil.which("g++") and shutil.which("setarch")), reason="needs g++ and setarch")
def test_only_a_race_is_reported(tmp_path):
    preload, source, program = tmp_path / "openmp.so", tmp_path / "race.cpp", tmp_path / "race"
    source.write_text(PROGRAM)
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", preload, PRELOAD, "-ldl"], check=True)
    build = ["g++", "-O1", "-fopenmp", "-fsanitize=thread", source, "-o", program]
    if subprocess.run(build, capture_output=True).returncode:
        pytest.skip("the compiler has no ThreadSanitizer")

    def runs(*args, preload=""):
        environment = {"LD_PRELOAD": str(preload), "TSAN_OPTIONS": "exitcode=66"}
        return subprocess.run(["setarch", "-R", program, *args], env=environment, capture_output=True).returncode

    if runs() != 66:
        pytest.skip("ThreadSanitizer does not run here, or sees libgomp without help")
    assert runs(preload=preload) == 0
    assert any(runs("race", preload=preload) == 66 for _ in range(10))  # on a busy machine the threads may not meet
