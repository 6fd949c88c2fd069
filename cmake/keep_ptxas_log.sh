#!/bin/sh
# keep_ptxas_log.sh FOLDER COMMAND...: runs a compiler, keeps its resource report (ptxas -v) as FOLDER/<source>.log and
# shows only what is not part of that report.
folder=$1
shift
stem=
for argument; do
  case $argument in *.cu) stem=$(basename "$argument" .cu) ;; esac
done
[ -n "$stem" ] || exec "$@"
mkdir -p "$folder"
"$@" 2>"$folder/$stem.log.new"
status=$?
grep -vE '^ptxas info|^ +[0-9]+ bytes stack frame' "$folder/$stem.log.new" >&2
# A compiler cache may answer without running ptxas: keep the report of the run that did.
if grep -q 'ptxas info' "$folder/$stem.log.new"; then mv "$folder/$stem.log.new" "$folder/$stem.log"; else rm "$folder/$stem.log.new"; fi
exit $status
