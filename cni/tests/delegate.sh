#!/bin/sh
# A delegate as host-local is one: a range of four addresses, each in turn, and one file for each
# that is taken, with the attachment in it. What it was asked for is in its log.
folder=${0%/*}/range
config=$(cat)
mkdir -p "$folder"
attachment="$CNI_CONTAINERID $CNI_IFNAME"
echo "$CNI_COMMAND $attachment" >>"$folder/../log"
case $CNI_COMMAND in
ADD)
  last=$(cat "$folder/last" 2>/dev/null || echo 5)
  for step in 1 2 3 4; do
    next=$(((last - 2 + step) % 4 + 2))
    [ -e "$folder/10.244.11.$next" ] && continue
    echo "$attachment" >"$folder/10.244.11.$next"
    echo $next >"$folder/last"
    echo "{\"cniVersion\":\"1.1.0\",\"ips\":[{\"address\":\"10.244.11.$next/24\"}]}"
    exit 0
  done
  echo '{"cniVersion":"1.1.0","code":11,"msg":"the range is full"}'
  exit 1
  ;;
DEL)
  for file in "$folder"/10.*; do
    [ "$(cat "$file" 2>/dev/null)" = "$attachment" ] && rm "$file"
  done
  exit 0
  ;;
GC)
  echo "$config" >"$folder/../collected"
  ;;
CHECK)
  echo '{"cniVersion":"1.1.0","code":3,"msg":"not one of mine"}'
  exit 1
  ;;
esac
