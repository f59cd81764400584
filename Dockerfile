# The image of Bulwark: `docker build --tag bulwark-worker .`
# Any Debian with Python 3.11 or newer, its venv and pip will do as a base. No feature of BuildKit is used.

ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
WORKDIR /opt/bulwark/app
COPY requirements-image.txt /tmp/
# pip stays outside: it installs into the environment from the builder's own.
RUN python3 -m venv --without-pip /opt/bulwark \
 && python3 -m pip --python /opt/bulwark/bin/python install --disable-pip-version-check \
    --no-cache-dir --require-hashes --requirement /tmp/requirements-image.txt
# Of pyarrow: what compilers and its own tests need, and Flight, which no other module of it links to.
RUN cd "$(/opt/bulwark/bin/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')" \
 && rm -rf pyarrow/include pyarrow/includes pyarrow/src pyarrow/tests \
    pyarrow/*.pxd pyarrow/*.pxi pyarrow/*.pyx \
    pyarrow/*flight* \
 && /opt/bulwark/bin/python -c 'import pyarrow.dataset, pyarrow.parquet' \
 && pwd > /tmp/site-packages
COPY alembic.ini ./
COPY alembic alembic
COPY db db
COPY jobs jobs
COPY worker worker
# The packages are found through the .pth file, so that PYTHONPATH is free for models and jobs of your own.
RUN echo /opt/bulwark/app > "$(cat /tmp/site-packages)/bulwark.pth" \
 && printf '#!/opt/bulwark/bin/python\nfrom worker.__main__ import run\n\nrun()\n' > /opt/bulwark/bin/bulwark \
 && chmod 755 /opt/bulwark/bin/bulwark \
 && /opt/bulwark/bin/python -m compileall -q alembic db jobs worker \
 && /opt/bulwark/bin/bulwark --help > /dev/null

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="Bulwark" \
      org.opencontainers.image.description="A job processor for bulk writes to PostgreSQL, with every effect committed exactly once."
RUN useradd --uid 10001 --no-create-home --home-dir /files --shell /usr/sbin/nologin bulwark \
 # Of which a volume for archives takes its owner.
 && install --directory --owner=10001 --group=10001 --mode=700 /archive
COPY --from=build /opt/bulwark /opt/bulwark
ENV PATH=/opt/bulwark/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    LANG=C.UTF-8
WORKDIR /files
USER 10001:10001
STOPSIGNAL SIGTERM
# For workers; of a container that does anything else it says nothing.
HEALTHCHECK --interval=30s --timeout=15s --start-period=60s --retries=3 \
    CMD ["bulwark", "health", "--here"]
# No entry point, so that `docker run IMAGE bulwark import ...` is what one types anywhere.
CMD ["bulwark", "worker"]
