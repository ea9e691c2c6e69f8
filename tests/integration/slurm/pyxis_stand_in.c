/* Stands in for pyxis: knows its options, so that a script written for it is accepted, and starts no container. What was
 * asked for reaches the task as PYXIS_CONTAINER_IMAGE and so on. */
#include <slurm/spank.h>
#include <ctype.h>
#include <stdlib.h>
#include <string.h>

SPANK_PLUGIN(pyxis_stand_in, 1)

static struct { char *name; int takes_value; char *given; } known[] = {
  {"container-image", 1, NULL}, {"container-mounts", 1, NULL}, {"container-name", 1, NULL},
  {"container-workdir", 1, NULL}, {"container-env", 1, NULL}, {"no-container-mount-home", 0, NULL},
};
enum { COUNT = sizeof known / sizeof *known };

static int remember(int number, const char *value, int remote) {
  (void)remote;
  known[number].given = strdup(value != NULL ? value : "yes");
  return 0;
}

int slurm_spank_init(spank_t spank, int argc, char **argv) {
  (void)argc, (void)argv;
  for (int i = 0; i < COUNT; i++) {
    struct spank_option option = {known[i].name, known[i].takes_value ? "VALUE" : NULL, "as pyxis", known[i].takes_value,
                                  i, remember};
    spank_option_register(spank, &option);
  }
  return 0;
}

int slurm_spank_task_init(spank_t spank, int argc, char **argv) {
  (void)argc, (void)argv;
  for (int i = 0; i < COUNT; i++) {
    char variable[64] = "PYXIS_";
    if (known[i].given == NULL) continue;
    for (const char *from = known[i].name; *from; from++)
      variable[strlen(variable)] = *from == '-' ? '_' : (char)toupper(*from);
    spank_setenv(spank, variable, known[i].given, 1);
  }
  return 0;
}
