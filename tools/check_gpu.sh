#!/usr/bin/env bash
# What `make check-gpu` runs: it gets what the check needs, beside the torch that is there, and starts it. It stops at
# nothing: what could not be had is said by the items that need it.
#   tools/check_gpu.sh PYTHON [FIELD=VALUE ...]
set -u
cd "$(dirname "$0")/.." || exit
python=$1
shift
if [ -x .venv/bin/python ]; then
    python=.venv/bin/python
elif [ -x .venv-gpu/bin/python ] || "$python" -m venv --system-site-packages .venv-gpu; then
    python=.venv-gpu/bin/python
fi
from=(--retries 1)
if [ -d wheels ]; then from+=(--no-index --find-links wheels); fi
get() { "$python" -m pip install --quiet "${from[@]}" "$@"; }

"$python" -c "import torch" 2> /dev/null || get "$(grep ^torch= requirements.txt)"
needed=$(mktemp)
grep -v ^torch= requirements.txt > "$needed"
grep -hE "^(pytest|pytest-timeout|hypothesis|transformers|tokenizers|pyarrow)==" requirements-[de]*.txt >> "$needed"
if ! get -r "$needed"; then  # one that cannot be had is not to keep the others away
    sed -E "s/ *#.*//; /^$/d" "$needed" | while read -r package; do get "$package"; done
fi
rm -f "$needed"
if compgen -G "wheels/grouped_gemm*" > /dev/null; then
    get --no-deps megablocks stanford-stk grouped_gemm
else
    get -r requirements-build.txt && "$python" -m tools.megablocks
fi
exec "$python" -m tools.check_gpu "$@"
