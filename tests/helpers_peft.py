"""Which tests need the PEFT that the installed transformers asks for."""

import peft
import pytest
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION


# transformers 5.24 hands caches over by another name, which PEFT before 0.22 does not know: prompts and prefixes then
# generate something else on any model, and transformers' own loader of adapters refuses to work.
needs_peft_of_transformers = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"this transformers needs PEFT {MIN_PEFT_VERSION}",
)
