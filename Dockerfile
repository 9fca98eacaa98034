# The one image: driver, Dask scheduler and workers, Prefect worker and server, Dask operator.
#
#   make image             build it here, tag = Git commit
#   prefect deploy --all   builds, pushes and registers it (prefect.yaml): same file, same arguments
#
# Needs BuildKit (docker buildx). Any Debian-like base with Python 3.11 and venv will do.
ARG BASE_IMAGE

# --- dependencies: exact versions with hashes, changes only with requirements/runtime.txt -------------------
FROM ${BASE_IMAGE:-python:3.11-slim-bookworm} AS dependencies
COPY requirements/bootstrap.txt /build/
# uv itself is locked like everything else; it stays in this stage.
RUN python3 -m venv /build/bootstrap \
 && /build/bootstrap/bin/pip install --quiet --no-cache-dir --require-hashes --requirement /build/bootstrap.txt
ENV UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never UV_CACHE_DIR=/build/cache
COPY requirements/runtime.txt /build/
RUN --mount=type=cache,target=/build/cache,sharing=locked \
    python3 -m venv --without-pip /opt/venv \
 && /build/bootstrap/bin/uv pip install --python /opt/venv/bin/python --no-deps --require-hashes --compile-bytecode \
      --requirement /build/runtime.txt
# Left out, because nothing imports it at run time: the libraries' own test suites, type stubs, C and Cython sources and
# headers, unminified browser scripts that have a minified twin, Arrow's Flight, symbols for debuggers (of
# four packages; strip breaks libraries that were patched for their wheel), and what botocore knows of other AWS services
# than those that s3fs calls: a flow that calls another one adds its name.
ARG AWS_SERVICES="s3 sso sso-oidc sts"
RUN apt-get update && apt-get install --yes --no-install-recommends binutils && rm -rf /var/lib/apt/lists/* \
 && cd /opt/venv/lib/python3.*/site-packages \
 && find . -depth -type d -name tests -not -path './numpy/testing/*' -exec rm -r {} + \
 && find . -type f \( -name '*.pyi' -o -name '*.pyx' -o -name '*.pxd' -o -name '*.pxi' -o -name '*.c' -o -name '*.cpp' \
      -o -name '*.cc' -o -name '*.h' -o -name '*.hpp' -o -name '*.f90' -o -name '*.js.map' -o -name '*.css.map' \) -delete \
 && find pyarrow -name '*flight*' -delete \
 && find asyncpg box fontTools sqlalchemy -name '*.so' -exec strip --strip-unneeded {} + \
 && for service in botocore/data/*/; do \
      case " $AWS_SERVICES " in *" $(basename "$service") "*) ;; *) rm -r "$service" ;; esac; done \
 && cd bokeh/server/static/js && for script in *.min.js; do rm -f "${script%.min.js}.js"; done; rm -rf compiler.js types
# Everything in the project folder is importable: it is laid out like the Git repository.
# gc.pth makes Python collect garbage less often: while modules are imported that is an eighth of the time.
COPY requirements/gc.pth /build/
RUN cd /opt/venv/lib/python3.*/site-packages && echo /app >app.pth && cp /build/gc.pth .

# --- the project ---------------------------------------------------------------------------------------------
FROM dependencies AS project
COPY requirements/dev.txt pyproject.toml /build/source/
COPY requirements/package.in /build/source/requirements/
COPY tidepool /build/source/tidepool
# The build back end (setuptools) is taken from the lock too.
RUN --mount=type=cache,target=/build/cache,sharing=locked \
    cd /build/source && touch README.md \
 && /build/bootstrap/bin/uv pip install --python /opt/venv/bin/python --no-deps --compile-bytecode \
      --build-constraints dev.txt --target /app .
COPY flows /app/flows
RUN /opt/venv/bin/python -m compileall -q /app/flows

# --- what runs -----------------------------------------------------------------------------------------------
FROM ${BASE_IMAGE:-python:3.11-slim-bookworm} AS runtime
# tini: PID 1 that forwards SIGTERM and collects orphans. haproxy: what flow runs may ask of the Prefect API. The standard
# library as bytecode: the public Python image ships none, and a pod with a read-only root file system would compile it
# again at every start.
RUN apt-get update && apt-get install --yes --no-install-recommends tini haproxy \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
 && python3 -m compileall -q -j 0 -x '/(test|idlelib|lib2to3|site-packages|dist-packages)/' \
      "$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
 && groupadd --gid 10001 tidepool \
 && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin tidepool
COPY --from=dependencies /opt/venv /opt/venv
COPY --from=project /app /app
WORKDIR /app
COPY samples samples
COPY k8s/work-pool k8s/work-pool
COPY environments environments
COPY prefect.yaml pyproject.toml automations.yam[l] ./
ARG REVISION=unknown
# The registration Job has no Git to ask for the deployments' version.
RUN echo "$REVISION" >REVISION
# The root file system may be read-only: everything that is written goes to /tmp, an emptyDir in Kubernetes.
# USER is for getpass.getuser() in dask-kubernetes, also under another numeric user (OpenShift).
ENV PATH=/app/bin:/opt/venv/bin:$PATH \
    HOME=/tmp \
    USER=tidepool \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PREFECT_HOME=/tmp/prefect \
    DASK_TEMPORARY_DIRECTORY=/tmp
USER 10001:10001
# Smoke test: every role's entry point imports, and what the flows import late, as the user that will run it.
RUN python -c "import flows, tidepool.operate.dask_operator, prefect.server.api.server, prefect_kubernetes.worker" \
 && python -c "import tomllib, importlib; late = tomllib.load(open('pyproject.toml', 'rb'))['tool']['tidepool']['late_imports']; \
      [importlib.import_module(each) for each in late]" \
 && haproxy -v >/dev/null && python -c "import tidepool.operate.server, tidepool.upstream.prefect_server" \
 && python -m distributed.cli.dask_scheduler --version && python -m distributed.cli.dask_worker --version \
 && tidepool --help >/dev/null && prefect version >/dev/null && rm -rf /tmp/*
ARG VERSION=0.1.0
ARG SOURCE=unknown
LABEL org.opencontainers.image.title=tidepool \
      org.opencontainers.image.description="Git repository of Python flows on Prefect, Kubernetes and Dask" \
      org.opencontainers.image.version=$VERSION \
      org.opencontainers.image.revision=$REVISION \
      org.opencontainers.image.source=$SOURCE
ENTRYPOINT ["tini", "--"]
CMD ["prefect", "version"]
