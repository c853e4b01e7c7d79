programs=${PROGRAMS:-/usr/bin/redis-server /usr/bin/redis-cli}
name=${IMAGE:-localhost/redis:1} file=${FILE:-/srv/images/redis.tar}
work=$(mktemp -d); cd $work
mkdir -p rootfs/proc rootfs/sys rootfs/dev rootfs/etc rootfs/run rootfs/tmp rootfs/bin
mkdir -p rootfs/opt/dir/inner
for path in etc/deleted etc/kept etc/moved opt/dir/one opt/dir/inner/two; do
  echo $path >rootfs/$path
done
for program in $programs; do
  real=$(readlink -f $program)
  mkdir -p rootfs$(dirname $program)
  cp $real rootfs$program
  for library in $(ldd $real | grep -o '/[^ ]*'); do
    mkdir -p rootfs$(dirname $library)
    cp -L $library rootfs$library
  done
done
tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -C rootfs -cf layer .
blobs=oci/blobs/sha256; mkdir -p $blobs
sum() { sha256sum $1 | cut -d' ' -f1; }
size() { stat -c %s $1; }
printf '{"architecture":"%s","os":"linux","config":{"Env":["PATH=/usr/bin"],"Cmd":["%s"]},"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}' \
  $(dpkg --print-architecture) ${programs%% *} $(sum layer) >config
type=application/vnd.oci.image
printf '{"schemaVersion":2,"mediaType":"%s.manifest.v1+json","config":{"mediaType":"%s.config.v1+json","digest":"sha256:%s","size":%s},"layers":[{"mediaType":"%s.layer.v1.tar","digest":"sha256:%s","size":%s}]}' \
  $type $type $(sum config) $(size config) $type $(sum layer) $(size layer) >manifest
printf '{"schemaVersion":2,"manifests":[{"mediaType":"%s.manifest.v1+json","digest":"sha256:%s","size":%s,"annotations":{"io.containerd.image.name":"%s"}}]}' \
  $type $(sum manifest) $(size manifest) $name >oci/index.json
printf '{"imageLayoutVersion":"1.0.0"}' >oci/oci-layout
for blob in layer config manifest; do mv $blob $blobs/$(sum $blob); done
mkdir -p $(dirname $file)
tar -C oci -cf $file oci-layout index.json blobs
rm -rf $work
