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
elif [ -x .venv-gpu/bin/python ]; then
    python=.venv-gpu/bin/python
elif "$python" -m venv --system-site-packages .venv-gpu; then
    # Where that python is of an environment itself, the new one sees its base's packages, and torch only by this.
    "$python" -c 'import sysconfig as s
for name in ("purelib", "platlib"): print(f"import site; site.addsitedir({s.get_path(name)!r})")' \
        > "$(.venv-gpu/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
    python=.venv-gpu/bin/python
fi
from=(--retries 1)
if [ -d wheels ]; then from+=(--no-index --find-links wheels); fi
get() { "$python" -m pip install --quiet "${from[@]}" "$@"; }

"$python" -c "import torch" 2> /dev/null || get "$(grep ^torch= requirements.txt)"
needed=$(mktemp)
grep -v ^torch= requirements.txt > "$needed"
others="pytest|pytest-timeout|hypothesis|transformers|tokenizers|pyarrow|x-transformers|psutil|jsonargparse|spmd-types|tyro"
grep -hE "^($others)==" requirements-[bde]*.txt | sort -u >> "$needed"
if ! get -r "$needed"; then  # one that cannot be had is not to keep the others away
    sed -E "s/ *#.*//; /^$/d" "$needed" | while read -r package; do get "$package"; done
fi
rm -f "$needed"
for peer in $(grep -ohE "(litgpt|torchtitan)==[0-9.]+" Makefile); do get --no-deps "$peer"; done
if compgen -G "wheels/grouped_gemm*" > /dev/null; then
    get --no-deps megablocks stanford-stk grouped_gemm
else
    get -r requirements-build.txt && timeout 240 "$python" -m tools.megablocks
fi
# The eight minutes are of all this, but for four that the check has in any case; minutes=N, if given, counts.
exec "$python" -m tools.check_gpu "minutes=$((SECONDS < 240 ? 8 - SECONDS / 60 : 4))" "$@"
