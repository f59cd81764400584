# usage: mut.sh file 'python replace' tests...
f=$1; a=$2; b=$3; shift 3
python3 - "$f" "$a" "$b" <<'P'
import sys,pathlib
f,a,b=sys.argv[1:4]; p=pathlib.Path(f); s=p.read_text(); assert s.count(a)>=1,(f,a); p.write_text(s.replace(a,b,1))
P
echo "== $f: $b"; PYTHONPATH=. timeout 280 /work/main/.venv/bin/python -m pytest -q -x "$@" 2>&1 | grep "^E  \|passed\|failed" | head -6
git checkout -q .
