//! The layer of the nodes with the applications.

use crate::lab::layer::LayerPlan;

/// nginx and Redis are in the node image.
pub const LAYER: LayerPlan = LayerPlan {
    name: "apps",
    packages: &[
        "default-jre-headless",
        // A Java compiler of 3 MB, where a JDK has 350.
        "libeclipse-jdt-core-compiler-batch-java",
        // Without the package of the server itself, which makes a database.
        "mariadb-client-core",
        "mariadb-server-core",
        "memcached",
        "postgresql",
        "python3-numpy",
        "valkey-server",
    ],
    files: &[
        (JAVA_SOURCE, include_str!("programs/Heap.java")),
        (ARRAYS, ARRAYS_TEXT),
    ],
    script: "\
rm -rf /var/lib/postgresql/*/main
useradd --system --no-create-home mysql
cd /usr/local/lib/lab
java -cp '/usr/share/java/*' org.eclipse.jdt.internal.compiler.batch.Main \
    -source 17 -target 17 Heap.java
test -s Heap.class
",
};

/// Where the compiled [`JAVA_SOURCE`] is.
pub const JAVA_CLASSES: &str = "/usr/local/lib/lab";
/// The program of [`super::numpy`], and where it is.
pub const ARRAYS_TEXT: &str = include_str!("programs/arrays.py");
pub const ARRAYS: &str = "/usr/local/lib/lab/arrays.py";
/// The program of [`super::jvm`].
const JAVA_SOURCE: &str = "/usr/local/lib/lab/Heap.java";
