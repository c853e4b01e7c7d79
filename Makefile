# Everything is built in release: what is measured is what is shipped.
CARGO ?= cargo
ARGS ?=
LAB = $${CARGO_TARGET_DIR:-target}/release/lab

.PHONY: build demo bench test clean tools

build: tools
	$(CARGO) build --release --workspace

# Moves a live Redis between two nodes and prints how long it was gone. ARGS=--keep leaves them up.
demo: build
	$(LAB) run demo $(ARGS)

# Pageferry and its peers over the workloads and links that tell most, in 20 minutes; the report is
# target/bench/report.html. ARGS=--full for all, or others of `lab bench`.
bench: build
	$(LAB) bench $(ARGS)

# In one command: with other packages chosen, crates have other features and are built again. The
# lab tests (bench/tests/lab.rs) need root, and take turns.
test: build
	$(CARGO) test --release --workspace

clean:
	-$(LAB) down
	$(CARGO) clean

# What a fresh machine may lack; the lab itself asks for what it needs beyond this.
tools:
	@command -v cc > /dev/null || { echo "cc is missing: apt-get install gcc"; \
	  apt-get update -qq && apt-get install -qq -y --no-install-recommends gcc libc6-dev; }
